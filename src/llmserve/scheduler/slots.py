# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The running requests as arrays: what a step of decodes touches without a Python loop."""

from bisect import bisect_left

import numpy as np

from llmserve.core.request import Request

_ONE = np.array(1, np.int64)  # numpy is slower with a Python integer


class Slots:
    """One entry a slot; slot 0 is the workers' padding sink and stays empty.

    Arrays of slots are int64: numpy indexes several times faster with them than with int32.

    `known` counts tokens that the host has, `total` also those in flight, `computed` the tokens
    whose KV is planned to be written. `running` lists the slots in policy order.
    """

    def __init__(self, num_seqs: int, block_size: int) -> None:
        n = num_seqs + 1
        self.requests: list[Request | None] = [None] * n
        self.known = np.zeros(n, np.int64)
        self.total = np.zeros(n, np.int64)
        self.computed = np.zeros(n, np.int64)
        self.limit = np.zeros(n, np.int64)  # max_total_tokens
        self.last = np.zeros(n, np.int64)  # limit - 1: the last token is drawn but not computed
        self.num_prompt = np.zeros(n, np.int64)
        self.client = np.zeros(n, np.int64)
        self.wire_id = np.zeros(n, np.uint32)
        self.untold = np.zeros(n, np.bool_)  # its start has not been told to the client
        self.has_drafts = np.zeros(n, np.bool_)  # the worker proposes drafts after a token
        self.scores = np.zeros(n, np.bool_)  # prompt logprobs still to be reported
        self.num_scoring = 0
        self.free = list(range(num_seqs, 0, -1))
        self._running = np.zeros(n, np.int64)
        self._orders: list[tuple[int, ...]] = []
        # the last tokens of each slot, position p at p % width: blocks are hashed from here
        self._width = 2 * block_size
        self._recent = np.zeros((n, self._width), np.int32)
        self._flat = self._recent.reshape(-1)
        self.recent = self._flat.data.cast("B")  # two blocks of int32 a slot
        self._modulus = np.array(self._width)

    @property
    def running(self) -> np.ndarray:
        """Slots in policy order, int64 [num_running]; a view that the next change invalidates."""
        return self._running[: len(self._orders)]

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return len(self._orders)

    def enter(self, request: Request, num_computed: int) -> int:
        """Puts a request into a free slot."""
        slot = self.free.pop()
        self.requests[slot] = request
        self.known[slot] = self.total[slot] = request.num_tokens
        self.computed[slot] = num_computed
        self.limit[slot] = limit = request.max_total_tokens
        self.last[slot] = limit - 1
        self.num_prompt[slot] = request.num_prompt_tokens
        self.client[slot] = request.client
        self.wire_id[slot] = request.wire_id
        self.untold[slot] = not request.told_start
        self.has_drafts[slot] = False
        self.scores[slot] = scores = request.wants_prompt_logprobs
        self.num_scoring += scores
        at = bisect_left(self._orders, request.order)
        n = len(self._orders)
        if at < n:
            self._running[at + 1 : n + 1] = self._running[at:n]
        self._running[at] = slot
        self._orders.insert(at, request.order)
        return slot

    def leave(self, slot: int) -> None:
        """Empties a slot."""
        request = self.requests[slot]
        assert request is not None
        self.scored(slot)
        at = bisect_left(self._orders, request.order)
        assert self._running[at] == slot
        del self._orders[at]
        n = len(self._orders)
        if at < n:
            self._running[at:n] = self._running[at + 1 : n + 1]
        self.requests[slot] = None
        self.free.append(slot)

    def scored(self, slot: int) -> None:
        """All prompt logprobs are reported, or nobody wants them any more."""
        self.num_scoring -= bool(self.scores[slot])
        self.scores[slot] = False

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """One more known token for each of `slots`; returns their new `known`."""
        known: np.ndarray = self.known[slots]
        self._flat[slots * self._modulus + known % self._modulus] = tokens
        known = known + _ONE  # in place it takes three times as long for one row
        self.known[slots] = known
        return known

    def flush(self, slot: int, end: int) -> None:
        """Moves the tokens before position `end` into `request.tokens`.

        At most `2 * block_size` tokens may lie between two calls.
        """
        request = self.requests[slot]
        assert request is not None
        start = len(request.tokens) >> 2
        if start < end:
            row, width = slot * self._width, self._width
            a, b = 4 * (row + start % width), 4 * (row + end % width)
            if a < b:
                request.tokens += self.recent[a:b]
            else:
                request.tokens += self.recent[a : 4 * (row + width)]
                request.tokens += self.recent[4 * row : b]

    def check_integrity(self) -> None:
        """Recounts everything."""
        used = [slot for slot, request in enumerate(self.requests) if request is not None]
        assert sorted(self.running.tolist()) == used
        assert sorted(self.free + used) == list(range(1, len(self.requests)))
        orders = [request.order for s in self.running if (request := self.requests[s]) is not None]
        assert orders == self._orders == sorted(orders)
        assert self.num_scoring == self.scores.sum()
        idle = np.ones(len(self.requests), np.bool_)
        idle[used] = False
        assert not self.scores[idle].any()
        assert (self.known[used] <= self.total[used]).all()
        assert (self.total[used] <= self.limit[used]).all()
