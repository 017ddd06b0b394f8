# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""EngineCore: scheduler and executor, one step at a time. No sockets, no processes."""

from collections import deque
from typing import Any

from llmserve.core.messages import AbortRequests, EngineOutputs, EngineRequest, SchedulerStats
from llmserve.core.scheduler_output import SchedulerOutput
from llmserve.executor.base import Executor, StepHandle
from llmserve.scheduler.scheduler import Scheduler


class EngineCore:
    """Overlap is a queue: `depth` 1 waits for each step, 2 plans the next one meanwhile."""

    def __init__(self, scheduler: Scheduler, executor: Executor, depth: int) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self._in_flight: deque[tuple[SchedulerOutput, StepHandle]] = deque()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def add(self, request: EngineRequest) -> None:
        """Queues a request; a refusal shows in the outputs."""
        self.scheduler.add(request)

    def abort(self, message: AbortRequests) -> None:
        """Frees what the requests hold; results still in flight are dropped when they arrive."""
        for request_id in message.request_ids:
            self.scheduler.abort(message.client, request_id)

    def step(self) -> None:
        """Starts the next step; finishes the oldest where the queue is full or nothing starts."""
        plan = self.scheduler.schedule() if len(self._in_flight) < self.depth else None
        if plan is not None:
            self.executor.forward(plan)
            self._in_flight.append((plan, self.executor.sample(plan)))
        if self._in_flight and (plan is None or len(self._in_flight) >= self.depth):
            done, handle = self._in_flight.popleft()
            self.scheduler.commit(done, handle.result())
        elif plan is None and self.scheduler.has_unfinished():
            raise AssertionError("requests wait, nothing runs and nothing is in flight")

    def take_outputs(self) -> dict[int, EngineOutputs]:
        """News per client since the last call."""
        return self.scheduler.take_outputs()

    def stats(self) -> SchedulerStats:
        """Gauges and counters as they stand."""
        return self.scheduler.stats()

    def call(self, method: str, args: list[Any]) -> Any:
        """A utility by name; LookupError for one that does not exist."""
        match method:
            case "ping":
                return None
            case "stats":
                return self.stats()
            case "reset_prefix_cache":
                return self.scheduler.reset_prefix_cache()
            case "check_integrity":
                self.scheduler.check_integrity()
                return True
            case _:
                raise LookupError(f"no engine method {method!r}")
