# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A clock that stands still, how slow the real one's machine is, and what misses a deadline."""

import time

_WORK_S = 0.035  # what `_work` takes on an idle core of the machine that the deadlines are set on


class Clock:
    """time.monotonic, moved by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class TooSlow(AssertionError):
    """Only a deadline was missed: the test is run once more (tests/conftest.py)."""


def in_time(took: float, limit: float) -> None:
    """TooSlow where `took` seconds are more than `limit`."""
    if took > limit:
        raise TooSlow(f"{took:.2f} s, over {limit:.2f}")


def calibrate() -> float:
    """How many times slower than the machine of the deadlines this one is now; at least 1."""
    return max(1.0, max(_work() for _ in range(3)) / _WORK_S)


def _work() -> float:
    began = time.perf_counter()
    sum(i * i for i in range(500_000))
    return time.perf_counter() - began
