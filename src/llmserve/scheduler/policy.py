# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Who goes first, and how much of a request goes into a step."""

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.request import Request

Gate = Callable[[int, int], int]  # (tokens to do, tokens left in the step) -> tokens, 0 = not now


_MOST_EXPECTED = 256  # tokens that a request is expected to make, whatever it allows


def order_of(policy: str, priority: int, arrival: int, turn: int = 0) -> tuple[int, int, int]:
    """Sort key of a request: smaller runs first, larger is preempted first."""
    return (priority if policy == "priority" else 0), turn, arrival


class Turns:
    """Start-time fair queueing: who asks for much waits behind those who ask for little.

    A tenant's turn comes after the work that it has asked for, counted from what runs now; so one
    tenant alone is served by arrival, and an idle one gathers no credit. Once there are two, none
    of them takes the last place of a batch that is all its own: the other need not wait for an end.
    """

    def __init__(self) -> None:
        self._now = 0
        self._next: dict[int, int] = {}
        self._running: defaultdict[int, int] = defaultdict(int)

    def take(self, tenant: int, num_prompt_tokens: int, max_new_tokens: int) -> int:
        """The turn of the tenant's next request."""
        turn = max(self._now, self._next.get(tenant, 0))
        cost = num_prompt_tokens + min(max_new_tokens, _MOST_EXPECTED)
        self._next[tenant] = turn + max(cost, 1)
        return turn

    def entered(self, tenant: int, turn: int) -> None:
        """A request with this turn has a place in the batch."""
        self._now = max(self._now, turn)
        self._running[tenant] += 1

    def left(self, tenant: int) -> None:
        """It has it no longer."""
        self._running[tenant] -= 1

    def leaves_last(self, tenant: int, num_running: int) -> bool:
        """Whether the tenant may not have the last place beside `num_running` requests."""
        return 0 < num_running == self._running[tenant] and len(self._next) > 1


def prompt_gates(config: SchedulerConfig) -> tuple[Gate, ...]:
    """Trims for requests with more than their next token to do, applied in turn."""
    threshold = config.long_prefill_token_threshold
    most = config.max_num_batched_tokens
    assert most is not None

    def whole(todo: int, budget: int) -> int:
        # only a resumed request can have more to do than fits any step: it is split after all
        return todo if todo <= budget else budget if todo > most else 0

    if not config.enable_chunked_prefill:
        return (whole,)
    if threshold:
        return (lambda todo, budget: min(todo, threshold), min)
    return (min,)


class WaitingQueue:
    """Requests by `order` for each tenant. One that finished meanwhile is skipped when it comes up.

    Nearly all come last and all go first, which in a sorted deque does not depend on its length.
    """

    def __init__(self) -> None:
        self._queues: defaultdict[int, deque[tuple[tuple[int, ...], Request]]] = defaultdict(deque)
        self._num_waiting = 0
        self._num_finished = 0
        self.num_prompt_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        items = chain.from_iterable(self._queues.values())
        return (request for _, request in items if request.finish_reason is None)

    def push(self, request: Request) -> None:
        """Adds a request; its `order` is unique."""
        queue, item = self._queues[request.tenant], (request.order, request)
        if queue and item < queue[-1]:
            insort(queue, item)
        else:
            queue.append(item)
        self._num_waiting += 1
        self.num_prompt_tokens += request.num_prompt_tokens

    def push_all(self, requests: Iterable[Request]) -> None:
        """Puts back what was popped."""
        for request in requests:
            self.push(request)

    def first(self, but: int | None = None) -> Request | None:
        """The request that goes next, still in the queue; none of the tenant `but`."""
        best: tuple[tuple[int, ...], Request] | None = None
        for tenant, queue in list(self._queues.items()):
            while queue and queue[0][1].finish_reason is not None:
                queue.popleft()
                self._num_finished -= 1
            if not queue:
                del self._queues[tenant]
            elif tenant != but and (best is None or queue[0] < best):
                best = queue[0]
        return None if best is None else best[1]

    def pop(self, request: Request) -> Request:
        """Removes what `first` has just returned."""
        self._queues[request.tenant].popleft()
        self._left(request)
        return request

    def discard(self, request: Request) -> None:
        """A request in the queue has just got its `finish_reason`."""
        self._left(request)
        self._num_finished += 1
        if self._num_finished > 64 + self._num_waiting:
            waiting = list(self)
            self._queues.clear()
            self._num_waiting = self._num_finished = self.num_prompt_tokens = 0
            self.push_all(waiting)

    def _left(self, request: Request) -> None:
        self._num_waiting -= 1
        self.num_prompt_tokens -= request.num_prompt_tokens
