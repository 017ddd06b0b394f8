# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Blocks by number: who holds them, which are findable, which goes next."""

import numpy as np


class BlockPool:
    """Reference counts, an index of cached blocks, and an O(1) least-recently-used free list.

    A block is held (`ref` > 0), free and cached (findable by its key until it is given out again),
    or free and empty. Empty ones are given out first, then cached ones, longest released first.
    The free list of cached blocks is a queue of (block, stamp); a block that is taken back by a
    hit just gets a new stamp, so its old entry is skipped when it comes up. Block 0 is never free.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self.ref = np.zeros(num_blocks, np.int32)
        self.ref[0] = 1
        self.index: dict[bytes, int] = {}
        self.keys: list[bytes | None] = [None] * num_blocks
        self.is_cached = np.zeros(num_blocks, np.bool_)
        self._empty = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)  # a stack
        self.num_empty = num_blocks - 1
        self._stamp = np.zeros(num_blocks, np.int64)
        self._queue = np.zeros(2 * num_blocks, np.int32)
        self._queue_stamp = np.zeros(2 * num_blocks, np.int64)
        self._head = self._tail = 0
        self.num_cached_free = 0
        self._place = np.zeros(num_blocks, np.int64)  # scratch of release_shared

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out."""
        return self.num_empty + self.num_cached_free

    def allocate(self, n: int) -> np.ndarray:
        """`n` blocks with one reference each, int32 [n]; the caller has looked at num_available."""
        assert n <= self.num_available, (n, self.num_available)
        top = self.num_empty
        take = min(n, top)
        blocks = self._empty[top - take : top][::-1]
        self.num_empty = top - take
        blocks = np.concatenate((blocks, self._evict(n - take))) if take < n else blocks.copy()
        self.ref[blocks] = 1
        return blocks

    def _evict(self, n: int) -> np.ndarray:
        """The `n` longest released cached blocks; they are no longer findable."""
        found: list[np.ndarray] = []
        missing = n
        while missing:
            stop = min(self._head + missing, self._tail)
            blocks = self._queue[self._head : stop]
            blocks = blocks[self._queue_stamp[self._head : stop] == self._stamp[blocks]]
            self._head = stop
            missing -= len(blocks)
            found.append(blocks)
        evicted = found[0] if len(found) == 1 else np.concatenate(found)
        self.num_cached_free -= n
        self.is_cached[evicted] = False
        index, keys = self.index, self.keys
        for block in evicted.tolist():
            del index[keys[block]]  # a cached block has a key
            keys[block] = None
        return evicted

    def touch(self, blocks: np.ndarray) -> None:
        """One more reference to each of `blocks` (distinct), which a lookup has just found."""
        free = blocks[self.ref[blocks] == 0]
        self._stamp[free] += 1
        self.num_cached_free -= len(free)
        self.ref[blocks] += 1

    def release(self, blocks: np.ndarray) -> None:
        """One reference less to each of `blocks` (distinct), the first to be reused first."""
        left = self.ref[blocks] - 1
        self.ref[blocks] = left
        self._put_back(blocks[left == 0])

    def release_shared(self, blocks: np.ndarray) -> None:
        """Like `release`, where a block may occur more than once."""
        np.subtract.at(self.ref, blocks, 1)
        gone = blocks[self.ref[blocks] == 0]
        if len(gone):
            place = np.arange(len(gone))
            self._place[gone] = place
            self._put_back(gone[self._place[gone] == place])

    def _put_back(self, blocks: np.ndarray) -> None:
        cached = self.is_cached[blocks]
        num_cached = np.count_nonzero(cached)
        if num_cached < len(blocks):
            self._push_empty(blocks[~cached])
        if num_cached:
            kept = blocks[cached]
            if self._tail + len(kept) > len(self._queue):
                self._compact()
            stop = self._tail + len(kept)
            self._queue[self._tail : stop] = kept
            stamps = self._stamp[kept] + 1
            self._stamp[kept] = stamps
            self._queue_stamp[self._tail : stop] = stamps
            self._tail = stop
            self.num_cached_free += len(kept)

    def _push_empty(self, blocks: np.ndarray) -> None:
        stop = self.num_empty + len(blocks)
        self._empty[self.num_empty : stop] = blocks[::-1]
        self.num_empty = stop

    def _compact(self) -> None:
        """Drops the skipped entries; at least `num_blocks` pushes lie between two calls."""
        blocks = self._queue[self._head : self._tail]
        live = self._queue_stamp[self._head : self._tail] == self._stamp[blocks]
        blocks = blocks[live]
        self._queue[: len(blocks)] = blocks
        self._queue_stamp[: len(blocks)] = self._stamp[blocks]
        self._head, self._tail = 0, len(blocks)

    def insert(self, keys: list[bytes], blocks: list[int]) -> None:
        """Makes held blocks findable. Whoever came first with the same content stays."""
        index, key_of = self.index, self.keys
        for key, block in zip(keys, blocks, strict=True):
            if key not in index and key_of[block] is None:
                index[key] = block
                key_of[block] = key
                self.is_cached[block] = True

    def forget(self, blocks: np.ndarray) -> None:
        """Makes held blocks unfindable."""
        for block in blocks.tolist():
            key = self.keys[block]
            if key is not None:
                assert self.ref[block] > 0
                del self.index[key]
                self.keys[block] = None
                self.is_cached[block] = False

    def forget_all(self) -> None:
        """Makes every block unfindable; no block is held."""
        assert self.num_available == self.num_blocks - 1
        if self.num_cached_free:
            self._push_empty(self._evict(self.num_cached_free))

    def check_integrity(self, held: np.ndarray) -> None:
        """Recounts everything; `held` int [num_blocks] are the references that exist outside."""
        expected = held.copy()
        expected[0] = 1
        wrong = np.flatnonzero(self.ref != expected)
        assert wrong.size == 0, f"blocks {wrong[:8]}: counted {expected[wrong[:8]]} references"
        empty = self._empty[: self.num_empty]
        queue = self._queue[self._head : self._tail]
        queue = queue[self._queue_stamp[self._head : self._tail] == self._stamp[queue]]
        assert len(queue) == self.num_cached_free
        free = np.sort(np.concatenate((empty, queue)))
        assert np.array_equal(free, np.flatnonzero(self.ref == 0)), "a block is lost or free twice"
        assert self.is_cached[queue].all() and not self.is_cached[empty].any()
        assert np.array_equal(self.is_cached, [key is not None for key in self.keys])
        assert {b: k for k, b in self.index.items()} == {
            b: k for b, k in enumerate(self.keys) if k is not None
        }
