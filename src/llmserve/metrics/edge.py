# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What one API server refused or cut, and how long its queue takes to drain."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

# Every reason there is, so that the number of series never depends on what clients send.
REASONS = (
    "unauthorized", "host", "queue_full", "queue_tokens", "key_limit", "deadline_header",
    "body_too_large", "json_bounds", "connections", "bad_http", "headers_too_large",
    "slow_request", "slow_reader",
)  # fmt: skip
_WINDOW_S = 5.0


class EdgeStats(Collector):
    """Counters of refusals. `dropped_frames` says how many messages from the engine were none."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.dropped_frames: Callable[[], int] = lambda: 0

    def refuse(self, reason: str) -> None:
        """One more; `reason` is one of REASONS."""
        assert reason in REASONS
        self.refused[reason] += 1

    def collect(self) -> Iterator[Metric]:
        """All families."""
        refused = CounterMetricFamily(
            "llmserve:refused", "Requests and connections refused or cut.", labels=["reason"]
        )
        for reason in REASONS:
            refused.add_metric([reason], self.refused[reason])
        yield refused
        dropped = CounterMetricFamily(
            "llmserve:api_dropped_frames", "Messages to this API server that were none."
        )
        dropped.add_metric([], self.dropped_frames())
        yield dropped


class DrainRate:
    """Requests that end per second, over the last 5 to 10 seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._count = 0
        self._before = 0.0  # per second

    def ended(self) -> None:
        """One request has ended."""
        self._roll()
        self._count += 1

    def seconds(self, num_waiting: int) -> int:
        """Until `num_waiting` requests have ended, 1 to 60; 60 while none ends."""
        self._roll()
        elapsed = time.monotonic() - self._began
        rate = (self._count + self._before * _WINDOW_S) / (elapsed + _WINDOW_S)
        return min(60, max(1, math.ceil(num_waiting / rate))) if rate else 60

    def _roll(self) -> None:
        elapsed = time.monotonic() - self._began
        if elapsed >= _WINDOW_S:
            self._before = self._count / elapsed
            self._began, self._count = time.monotonic(), 0
