# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A clock that stands still, and how slow the real one's machine is."""

import time

_WORK_S = 0.035  # what `_work` takes on an idle core of the machine that the deadlines are set on


class Clock:
    """time.monotonic, moved by hand."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def calibrate() -> float:
    """How many times slower than the machine of the deadlines this one is now; at least 1."""
    return max(1.0, max(_work() for _ in range(3)) / _WORK_S)


def _work() -> float:
    began = time.perf_counter()
    sum(i * i for i in range(500_000))
    return time.perf_counter() - began
