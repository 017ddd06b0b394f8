# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A page of shared memory in which the step loop shows that it gets on.

Whoever maps the page judges by himself: nothing is asked of a process that may be stuck. Times are
time.monotonic() seconds, which all processes of a host share.
"""

import time

from llmserve.utils.shared_page import shared_page

IDLE_BEAT_S = 1.0  # between signs of a loop that has nothing to do
_STEPS, _BEAT, _BUSY_SINCE, _EXTRA = range(4)
_BYTES = 4 * 8
# A step may take so much longer per token than the slowest of late: long contexts are slower, and
# so is a busy machine.
_SLACK = 4.0
_FORGET = 0.98  # per step, of the slowest pace
_FIRST_PACE_S = 0.25  # per token, before any was measured: 7B parameters on two cores
_LOOK_S = 1.0  # what passes at most between two looks of who is awake


class Watchdog:
    """How long a sign has not changed before the eyes of one who ends a process for it.

    Both may have been stopped, or the machine: time without looks counts for `_LOOK_S`.
    """

    def __init__(self) -> None:
        self._sign = 0.0
        self._looked = time.monotonic()
        self._quiet = 0.0

    def quiet(self, sign: float) -> float:
        """Seconds, as of this look."""
        now = time.monotonic()
        self._quiet += min(now - self._looked, _LOOK_S)
        self._looked = now
        if sign != self._sign:
            self._sign, self._quiet = sign, 0.0
        return self._quiet


class Heartbeat:
    """Four doubles, each written whole: steps begun, last sign, busy since (0 = idle), and how many
    seconds more than usual the next sign may take. There is one writer."""

    def __init__(self, path: str) -> None:
        self._page = memoryview(shared_page(path, _BYTES)).cast("d")
        self._pace = _FIRST_PACE_S
        self._tokens = self._tokens_before = 0  # of the last two steps

    def idle(self) -> None:
        """There is nothing to do; said again every IDLE_BEAT_S."""
        self._page[_BUSY_SINCE] = 0.0
        self._page[_BEAT] = time.monotonic()
        self._page[_EXTRA] = 0.0
        self._tokens = self._tokens_before = 0

    def step(self, num_tokens: int) -> None:
        """A step of `num_tokens` begins; the one before may still run."""
        page, now = self._page, time.monotonic()
        if self._tokens:  # the time since then went to that step, or to the one before it
            pace = (now - page[_BEAT]) / max(self._tokens, self._tokens_before)
            self._pace = max(self._pace * _FORGET, _SLACK * pace)
        if not page[_BUSY_SINCE]:
            page[_BUSY_SINCE] = now
        page[_EXTRA] = self._pace * (num_tokens + self._tokens)
        page[_BEAT] = now
        page[_STEPS] += 1
        self._tokens_before, self._tokens = self._tokens, num_tokens

    @property
    def num_steps(self) -> int:
        """Steps begun."""
        return int(self._page[_STEPS])

    @property
    def busy_since(self) -> float:
        """When the work at hand began; 0 is idle."""
        return self._page[_BUSY_SINCE]

    @property
    def age(self) -> float:
        """Seconds since the last sign; 0 before the first."""
        beat = self._page[_BEAT]
        return max(0.0, time.monotonic() - beat) if beat else 0.0

    @property
    def sign(self) -> float:
        """When the last sign was given; 0 before the first."""
        return self._page[_BEAT]

    def allowed(self, timeout: float) -> float:
        """Seconds that may pass until a sign is overdue by `timeout`."""
        return timeout + self._page[_EXTRA]

    def late(self, timeout: float) -> bool:
        """Whether a sign is overdue by `timeout` seconds; who ends a process has a Watchdog."""
        return self.age > self.allowed(timeout)
