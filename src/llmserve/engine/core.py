# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""EngineCore: scheduler and executor, one step at a time. No sockets, no processes."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmserve.core.messages import AbortRequests, EngineOutputs, EngineRequest, SchedulerStats
from llmserve.core.request import Request
from llmserve.core.scheduler_output import LateMask, SchedulerOutput
from llmserve.errors import LLMServeError
from llmserve.executor.base import Executor, StepHandle
from llmserve.scheduler.scheduler import Scheduler
from llmserve.structured_output.manager import GrammarManager, GrammarRow
from llmserve.utils.heartbeat import Heartbeat


@dataclass(slots=True)
class _Step:
    """In flight. `late` is where its mask is to be written, until it is."""

    plan: SchedulerOutput
    handle: StepHandle
    rows: list[GrammarRow]
    late: LateMask | None


class EngineCore:
    """Overlap is a queue: `depth` 1 waits for each step, 2 plans the next one meanwhile."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        depth: int,
        grammars: GrammarManager | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self.grammars = grammars
        self.heartbeat: Heartbeat | None = None
        self._in_flight: deque[_Step] = deque()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def add(self, request: EngineRequest) -> None:
        """Queues a request; a refusal shows in the outputs."""
        if not request.params.masked or self.grammars is None:
            self.scheduler.add(request)
            return
        key = request.client << 32 | request.request_id
        if key in self.scheduler.requests:
            self.scheduler.add(request)  # which counts it as a duplicate
            return
        self.grammars.keep_only(self.scheduler.requests)  # a deadline ends some
        self.scheduler.add(request, hold=True)
        if key in self.scheduler.requests and self.grammars.enter(key, request.params):
            self.scheduler.release(key)

    def release_held(self) -> None:
        """Requests whose grammar was compiled meanwhile may run; those that have none end."""
        if self.grammars is not None:
            for key, error in self.grammars.take_ready():
                if error is None and key in self.scheduler.requests:
                    self.scheduler.release(key)
                else:
                    self._end(key, error)

    def abort(self, message: AbortRequests) -> None:
        """Frees what the requests hold; results still in flight are dropped when they arrive."""
        for request_id in message.request_ids:
            self.scheduler.abort(message.client, request_id)
            if self.grammars is not None:
                self.grammars.leave(message.client << 32 | request_id)

    def abort_client(self, client: int) -> None:
        """Frees what all requests of a client hold."""
        ids = [key & 0xFFFFFFFF for key in self.scheduler.requests if key >> 32 == client]
        self.abort(AbortRequests(client, ids))

    def step(self) -> None:
        """Starts the next step; finishes the oldest where the queue is full or nothing starts."""
        plan = self.scheduler.schedule() if len(self._in_flight) < self.depth else None
        if plan is not None:
            if self.heartbeat is not None:
                self.heartbeat.step(int(plan.num_scheduled.sum()))
            self.executor.forward(plan)
            rows, late = self._mask(plan)
            self._in_flight.append(_Step(plan, self.executor.sample(plan), rows, late))
            self._mask_late()
        if self._in_flight and (plan is None or len(self._in_flight) >= self.depth):
            self._commit()
        elif plan is None and self.scheduler.has_unfinished():
            raise AssertionError("requests wait, nothing runs and nothing is in flight")

    def _mask(self, plan: SchedulerOutput) -> tuple[list[GrammarRow], LateMask | None]:
        """Fills the plan's mask, where rows of it are bound, while its forward runs; or says where
        `_mask_late` is to write it.

        The mask of a row needs the row's token of the step before.
        """
        grammars = self.grammars
        if grammars is None:
            return [], None
        rows = grammars.rows_of(plan, self.scheduler.slots.requests)
        if not grammars.binds(rows, len(self._in_flight)):
            return rows, None
        late = self.executor.late_mask(plan)
        if late is None:
            while self._in_flight:
                self._commit()
            self._end_all(grammars.mask(plan, rows))
        return rows, late

    def _mask_late(self) -> None:
        """The mask of the oldest step in flight: all tokens before it are committed."""
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.late is None:
            return
        mask, step.late = step.late, None
        rows, words = {row.row: row for row in step.rows}, mask.words
        if len(rows) < len(words):
            is_free = np.ones(len(words), np.bool_)
            is_free[list(rows)] = False
            words[is_free] = -1
        assert self.grammars is not None
        failed = self.grammars.fill(rows, words)
        mask.release()
        self._end_all(failed)

    def _commit(self) -> None:
        step = self._in_flight.popleft()
        output = step.handle.result()
        failed = self.grammars.advance(step.rows, output) if self.grammars and step.rows else []
        self.scheduler.commit(step.plan, output)
        self._end_all(failed)
        for row in step.rows:
            if row.request.finish_reason is not None and self.grammars is not None:
                self.grammars.leave(row.request.key)
        self._mask_late()

    def _end_all(self, failed: list[tuple[Request, LLMServeError]]) -> None:
        for request, error in failed:
            self._end(request.key, error)

    def _end(self, key: int, error: LLMServeError | None) -> None:
        if error is not None:
            self.scheduler.fail(key, error)
        if self.grammars is not None:
            self.grammars.leave(key)

    def take_outputs(self) -> dict[int, EngineOutputs]:
        """News per client since the last call."""
        return self.scheduler.take_outputs()

    def stats(self) -> SchedulerStats:
        """Gauges and counters as they stand."""
        stats = self.scheduler.stats()
        stats.compilations = self.executor.compilations()
        return stats

    def shutdown(self) -> None:
        """Ends what the engine has started; idempotent."""
        self.executor.shutdown()
        if self.grammars is not None:
            self.grammars.compiler.close()

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
