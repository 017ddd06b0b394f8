# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Blocks by number: who holds them, which are findable, which goes next."""

import numpy as np

_ZERO, _ONE, _NOWHERE = np.array(0), np.array(1), np.array(-1)  # Python integers are slower


class BlockPool:
    """Reference counts, an index of cached blocks, and an O(1) least-recently-used free list.

    A block is held (`ref` > 0), free and cached (findable until it is given out again), or free and
    empty. Empty ones are given out first, then cached ones, longest released first.
    The free list of cached blocks is a queue in a ring, and each of them knows its place in it; one
    that is taken back by a hit forgets it, so its old entry is skipped when it comes up. Block 0 is
    never free. A name (of a prefix) is looked up once for all KV groups: `index` gives its row of
    `_table`, a block for each group, 0 where there is none. A row without blocks is given back.
    All arrays of blocks are int64: numpy indexes several times faster with them than with int32.
    """

    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        assert num_blocks >= 2, num_blocks
        self.num_blocks = num_blocks
        self.ref = np.zeros(num_blocks, np.int64)
        self.ref[0] = 1
        self.index: dict[bytes, int] = {}
        self._names = [b""] * (num_blocks + 1)  # of a row; of a free one, what it was last
        self._num_named = [0] * (num_blocks + 1)  # blocks in a row
        self._free_rows = list(range(num_blocks, 0, -1))
        self._num_groups = np.array(num_groups)
        self._table = np.zeros((num_blocks + 1, num_groups), np.int64)  # nothing is in row 0
        self._cells = self._table.reshape(-1)
        self._none = [0] * num_groups
        self._numbers = np.arange(self._cells.size).reshape(self._table.shape)  # of the cells
        self._cell_of = np.zeros(num_blocks, np.int64)  # 0: not cached
        self._cell_of[0] = -1  # so that 0 in place of a block is as one that has its name
        self._empty = np.arange(num_blocks - 1, -1, -1)  # a stack
        self.num_empty = num_blocks - 1
        self._place = np.zeros(num_blocks, np.int64)  # of a block in the queue; _NOWHERE
        self._queue = np.zeros(2 * num_blocks, np.int64)
        self._places = np.tile(np.arange(2 * num_blocks), 2)  # so that a slice of it goes round
        self._head = self._tail = 0
        self.num_cached_free = 0
        self._scratch = np.zeros(num_blocks, np.int64)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give out."""
        return self.num_empty + self.num_cached_free

    def allocate(self, n: int) -> np.ndarray:
        """`n` blocks with one reference each, int64 [n]; the caller has looked at num_available."""
        assert n <= self.num_available, (n, self.num_available)
        top = self.num_empty
        take = min(n, top)
        self.num_empty = top - take
        if take == n:
            blocks = self._empty[top - take : top][::-1].copy()
        elif take:
            blocks = np.concatenate((self._empty[:top][::-1], self._evict(n - take)))
        else:
            blocks = self._evict(n)
        self.ref[blocks] = 1
        return blocks

    def _evict(self, n: int) -> np.ndarray:
        """The `n` longest released cached blocks; they are no longer findable."""
        if self._tail - self._head > self.num_cached_free:  # some were taken back
            found: list[np.ndarray] = []
            missing = n
            while missing:
                stop = min(self._head + missing, self._tail)
                blocks = self._live(self._head, stop)
                self._head = stop
                missing -= len(blocks)
                found.append(blocks)
            evicted: np.ndarray = np.concatenate(found)
        else:
            evicted = self._queue[self._between(self._head, self._head + n)]
            self._head += n
        self.num_cached_free -= n
        self._unfind(evicted)
        return evicted

    def _between(self, start: int, stop: int) -> np.ndarray:
        """Places in the queue of the entries [start, stop), counted from its first ever."""
        at = start % len(self._queue)
        places: np.ndarray = self._places[at : at + stop - start]
        return places

    def _live(self, start: int, stop: int) -> np.ndarray:
        """Blocks of those entries that count."""
        where = self._between(start, stop)
        blocks = self._queue[where]
        live: np.ndarray = blocks[self._place[blocks] == where]
        return live

    def _unfind(self, blocks: np.ndarray) -> None:
        cells = self._cell_of[blocks]
        self._cell_of[blocks] = _ZERO
        self._cells[cells] = _ZERO
        num_named = self._num_named
        for row in (cells // self._num_groups).tolist():
            num_named[row] = left = num_named[row] - 1
            if not left:
                del self.index[self._names[row]]
                self._free_rows.append(row)

    def find(self, name: bytes) -> list[int]:
        """The block of each group that is cached under `name`, 0 where there is none."""
        row = self.index.get(name)
        return self._none if row is None else self._table[row].tolist()

    def find_all(self, names: list[bytes]) -> np.ndarray:
        """`find` for names of which each has a block; int64 [len(names), groups]."""
        found: np.ndarray = self._table[[self.index[name] for name in names]]
        return found

    def touch(self, blocks: np.ndarray) -> None:
        """One more reference to each of `blocks` (distinct), which a lookup has just found."""
        free = blocks[self.ref[blocks] == 0]
        self._place[free] = _NOWHERE
        self.num_cached_free -= len(free)
        self.ref[blocks] += 1

    def release(self, blocks: np.ndarray) -> None:
        """One reference less to each of `blocks` (distinct), the first to be reused first."""
        left = self.ref[blocks] - _ONE
        self.ref[blocks] = left
        self._put_back(blocks[left == _ZERO] if np.count_nonzero(left) else blocks)

    def release_shared(self, blocks: np.ndarray) -> None:
        """Like `release`, where a block may occur more than once."""
        if not np.count_nonzero(self.ref[blocks] > _ONE):  # so none occurs twice
            self.ref[blocks] = _ZERO
            self._put_back(blocks)
            return
        np.subtract.at(self.ref, blocks, 1)
        gone = blocks[self.ref[blocks] == 0]
        if len(gone):
            place = np.arange(len(gone))
            self._scratch[gone] = place
            self._put_back(gone[self._scratch[gone] == place])

    def _put_back(self, blocks: np.ndarray) -> None:
        kept, cells = blocks, self._cell_of[blocks]
        n = int(np.count_nonzero(cells))
        if n < len(blocks):
            cached = cells > _ZERO
            self._push_empty(blocks[~cached])
            kept = blocks[cached]
        if n:
            if self._tail + n > self._head + len(self._queue):  # too many count no more
                live = self._live(self._head, self._tail)
                self._head = self._tail = 0
                self._append(live)
            self._append(kept)
            self.num_cached_free += n

    def _append(self, blocks: np.ndarray) -> None:
        where = self._between(self._tail, self._tail + len(blocks))
        self._tail += len(blocks)
        self._queue[where] = blocks
        self._place[blocks] = where

    def _push_empty(self, blocks: np.ndarray) -> None:
        stop = self.num_empty + len(blocks)
        self._empty[self.num_empty : stop] = blocks[::-1]
        self.num_empty = stop

    def insert(self, names: list[bytes], groups: np.ndarray, blocks: np.ndarray) -> None:
        """Makes held blocks findable. Whoever came first with the same content stays.

        `blocks` int64 [len(names), len(groups)]: distinct, or 0 for none.
        """
        flat = blocks.ravel()
        known = self._cell_of[flat]
        full = not np.count_nonzero(known)
        if not full:
            blocks = np.where(known, 0, flat).reshape(blocks.shape)
            some = np.flatnonzero(blocks.any(axis=1))
            names = [names[i] for i in some.tolist()]
            flat = blocks[some].ravel()
        index, names_of, free_rows = self.index, self._names, self._free_rows
        num_free, rows = len(free_rows), []
        for name in names:
            row = index.get(name)
            if row is None:
                row = index[name] = free_rows.pop()
                names_of[row] = name
            rows.append(row)
        cells = self._numbers.take(rows, axis=0).take(groups, axis=1).ravel()
        if not full:
            cells, flat = cells[flat > 0], flat[flat > 0]
        if num_free - len(free_rows) < len(names):  # some names are there already, or there twice
            empty = self._cells[cells] == 0
            cells, flat = cells[empty], flat[empty]
            self._cells[cells[::-1]] = flat[::-1]  # the first stays
            mine = self._cells[cells] == flat
            cells, flat, full = cells[mine], flat[mine], False
        num_named, width = self._num_named, len(groups)
        if full:
            for row in rows:
                num_named[row] = width
        else:
            for row in (cells // self._num_groups).tolist():
                num_named[row] += 1
        self._cells[cells] = flat
        self._cell_of[flat] = cells

    def forget(self, blocks: np.ndarray) -> None:
        """Makes held blocks unfindable."""
        assert self.ref[blocks].all()
        self._unfind(blocks[self._cell_of[blocks] > 0])

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
        queue = self._live(self._head, self._tail)
        assert len(queue) == self.num_cached_free
        free = np.sort(np.concatenate((empty, queue)))
        assert np.array_equal(free, np.flatnonzero(self.ref == 0)), "a block is lost or free twice"
        assert (self._cell_of[queue] > 0).all() and not self._cell_of[empty].any()
        cached = np.flatnonzero(self._cell_of > 0)
        assert np.array_equal(self._cells[self._cell_of[cached]], cached)
        assert np.count_nonzero(self._cells) == len(cached)
        rows = sorted([*self.index.values(), *self._free_rows])
        assert rows == list(range(1, self.num_blocks + 1))
        assert self._num_named == np.count_nonzero(self._table, axis=1).tolist()
        for name, row in self.index.items():
            assert self._names[row] == name and self._num_named[row]
