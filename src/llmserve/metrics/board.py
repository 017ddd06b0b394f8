# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the API servers of one port show each other and their supervisor, in shared memory.

Each has a row of float64: gauges, then counters. A row has one writer, so nothing is locked; a sum
over the rows is what holds of all servers. When one ends, the supervisor empties its gauges, and
the server that takes its place goes on with its counters: they never fall.
"""

import mmap
import time

import numpy as np

from llmserve.utils.shared_page import shared_page

MAX_SERVERS = 16
BEAT_S = 0.25  # between signs of an event loop
_FRESH_S = 1.0  # a sign this old says that its server is busy, stuck or gone

BEAT, READY, CONNECTIONS, RUNNING, PLACES, UNFINISHED, _KEYS = range(7)  # gauges; then one a key
# Counters: requests that were answered, servers that were replaced, refusals, requests in detail.
ENDED, RESTARTS = 0, 1
EDGE = slice(2, 32)
REQUESTS = slice(32, 1024)
_NUM_COUNTERS = 1024


class Board:
    """Row `slot` is our own. Without `path` there is nobody else."""

    def __init__(self, path: str | None = None, slot: int = 0, num_keys: int = 1) -> None:
        self.slot = slot
        self._num_gauges = _KEYS + max(1, num_keys)
        width = self._num_gauges + _NUM_COUNTERS
        size = 8 * MAX_SERVERS * width
        page = mmap.mmap(-1, size) if path is None else shared_page(path, size)
        self._rows = np.frombuffer(page, np.float64).reshape(MAX_SERVERS, width)
        own = memoryview(page).cast("d")[slot * width : (slot + 1) * width]
        self._gauges, self._counters = own[: self._num_gauges], own[self._num_gauges :]

    # -- our own row

    def set(self, gauge: int, value: float) -> None:
        """`gauge` is one of the names above."""
        self._gauges[gauge] = value

    def beat(self) -> None:
        """Our event loop gets on."""
        self._gauges[BEAT] = time.monotonic()

    def move(self, key: int, count: int) -> None:
        """`count` more requests of API key number `key` have a place."""
        self._gauges[PLACES] += count
        self._gauges[_KEYS + key] += count

    def count(self, counter: int) -> None:
        """One more of `ENDED`."""
        self._counters[counter] += 1

    def counters(self, section: slice) -> "memoryview[float]":
        """Our part of `EDGE` or `REQUESTS`, to count in."""
        return self._counters[section]

    # -- all rows

    def sum(self, gauge: int) -> int:
        """Of all servers."""
        return int(self._rows[:, gauge].sum())

    def places(self, key: int) -> int:
        """Requests of API key number `key` that have a place."""
        return self.sum(_KEYS + key)

    def total(self, counter: int) -> int:
        """`ENDED` or `RESTARTS` of all servers, of those that ended too."""
        return int(self._rows[:, self._num_gauges + counter].sum())

    def totals(self, section: slice) -> "memoryview[float]":
        """`counters` of all servers added up; a copy."""
        return memoryview(self._rows[:, self._num_gauges :][:, section].sum(0)).cast("B").cast("d")

    def num_fresh(self) -> int:
        """Servers whose event loops get on."""
        return int(self._fresh().sum())

    def _fresh(self) -> np.ndarray:
        return self._rows[:, BEAT] > time.monotonic() - _FRESH_S

    def accepts(self, num_connections: int, left: bool) -> bool:
        """Whether the next connection is ours, who have `num_connections`: not where another server
        is ready and we are not, nor, before we have `left` it to it, where it has fewer."""
        self.set(CONNECTIONS, num_connections)
        others = self._fresh() & (self._rows[:, READY] > 0)
        others[self.slot] = False
        if not others.any():
            return True
        fewest = int(self._rows[others, CONNECTIONS].min())
        return bool(self._gauges[READY]) and (left or num_connections <= fewest)

    # -- the supervisor

    def sign(self, slot: int) -> float:
        """When the server's event loop last gave one; 0 before the first."""
        return float(self._rows[slot, BEAT])

    def is_ready(self, slot: int) -> bool:
        """Whether the server takes requests."""
        return bool(self._rows[slot, READY])

    def replace(self, slot: int) -> None:
        """Gives back what a server that ended had, and counts it."""
        self._rows[slot, : self._num_gauges] = 0.0
        self._rows[slot, self._num_gauges + RESTARTS] += 1
