# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the API servers refused or cut, and how long their queue takes to drain."""

import math
import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from llmserve.metrics.board import EDGE, RESTARTS, Board

# Every reason there is, so that the number of series never depends on what clients send.
REASONS = (
    "unauthorized", "host", "queue_full", "queue_tokens", "key_limit", "deadline_header",
    "body_too_large", "json_bounds", "connections", "bad_http", "headers_too_large",
    "slow_request", "slow_reader",
)  # fmt: skip
_WINDOW_S = 5.0


class EdgeStats(Collector):
    """Counters of refusals, ours and those of the servers beside us. `dropped_frames` says how many
    messages from the engine to us were none."""

    def __init__(self, board: Board) -> None:
        self.dropped_frames: Callable[[], int] = lambda: 0
        self._num_dropped = 0  # as published
        self._board = board
        self._cells = board.counters(EDGE)
        assert len(REASONS) < len(self._cells)

    def refuse(self, reason: str) -> None:
        """One more; `reason` is one of REASONS."""
        assert reason in REASONS
        self._cells[1 + REASONS.index(reason)] += 1

    @property
    def refused(self) -> dict[str, int]:
        """By reason, of all servers."""
        return dict(zip(REASONS, map(int, self._board.totals(EDGE)[1:]), strict=False))

    def publish(self) -> None:
        """Lets the other servers know of what is counted elsewhere."""
        dropped = self.dropped_frames()
        self._cells[0] += dropped - self._num_dropped
        self._num_dropped = dropped

    def collect(self) -> Iterator[Metric]:
        """All families."""
        self.publish()
        refused = CounterMetricFamily(
            "llmserve:refused", "Requests and connections refused or cut.", labels=["reason"]
        )
        for reason, number in self.refused.items():
            refused.add_metric([reason], number)
        yield refused
        dropped = self._board.totals(EDGE)[0]
        for name, help, count in (
            ("api_dropped_frames", "Messages to API servers that were none.", dropped),
            ("api_server_restarts", "API servers that were lost.", self._board.total(RESTARTS)),
        ):
            family = CounterMetricFamily(f"llmserve:{name}", help)
            family.add_metric([], count)
            yield family


class DrainRate:
    """Requests that end per second, over the last 5 to 10 seconds; `total` is how many ever did."""

    def __init__(self, total: Callable[[], int]) -> None:
        self._total = total
        self._began = time.monotonic()
        self._seen = total()
        self._before = 0.0  # per second

    def seconds(self, num_waiting: int) -> int:
        """Until `num_waiting` requests have ended, 1 to 60; 60 while none ends."""
        elapsed, count = time.monotonic() - self._began, self._total() - self._seen
        rate = (count + self._before * _WINDOW_S) / (elapsed + _WINDOW_S)
        self.roll()
        return min(60, max(1, math.ceil(num_waiting / rate))) if rate else 60

    def roll(self) -> None:
        """Forgets what is long ago; called now and then."""
        elapsed = time.monotonic() - self._began
        if elapsed >= _WINDOW_S:
            total = self._total()
            self._before = (total - self._seen) / elapsed
            self._began, self._seen = time.monotonic(), total
