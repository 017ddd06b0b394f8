# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Which blocks each running request holds, and which prefixes can be reused."""

from dataclasses import dataclass
from math import gcd, lcm

import numpy as np

from llmserve.core.kv_spec import KVCacheConfig, KVGroup
from llmserve.core.request import Request
from llmserve.kv_cache.block_pool import BlockPool
from llmserve.kv_cache.groups import blocks_at_peak, reach
from llmserve.kv_cache.prefix_hash import extend_hashes

_NO_ROWS = np.empty((0, 4), np.int32)


@dataclass(slots=True, frozen=True)
class Hit:
    """A cached prefix; `blocks[f]` int32 [groups of family f, blocks that the next query reads]."""

    num_tokens: int
    blocks: list[np.ndarray]


_MISS = Hit(0, [])


class _Family:
    """Block tables of the KV groups with equal block size and reach: they grow and shrink alike.

    A slot's entries before `first` are out of reach and 0; `count` are in use, those included.
    """

    def __init__(
        self, groups: list[int], kind: KVGroup, num_slots: int, max_model_len: int, max_chunk: int
    ) -> None:
        self.groups = groups
        self.group_column = np.array(groups, np.int32).reshape(-1, 1)
        self.tags = [bytes([group]) for group in groups]  # with a hash: the key of a block
        self.block_size = kind.block_size
        self.reach = reach(kind.spec)
        width = -(-max_model_len // kind.block_size)
        self.table = np.zeros((len(groups), num_slots, width), np.int32)
        self.count = np.zeros(num_slots, np.int32)
        self.first = np.zeros(num_slots, np.int32)
        self.num_cached = np.zeros(num_slots, np.int32)  # blocks that were made findable
        self.most_blocks = blocks_at_peak(kind, max_model_len, max_chunk)
        ends = np.arange(0, -width * kind.block_size, -kind.block_size)
        self.release_order = np.broadcast_to(ends, (len(groups), width))

    def first_needed(self, position: int) -> int:
        """Index of the first block that a query at `position` reads."""
        return 0 if self.reach is None else max(position - self.reach + 1, 0) // self.block_size

    def rows(
        self, slots: np.ndarray | int, index: np.ndarray, blocks: np.ndarray | int
    ) -> np.ndarray:
        """Rows of SchedulerOutput.new_blocks; `blocks` [num groups, n] or 0."""
        out = np.empty((len(self.groups), len(index), 4), np.int32)
        out[:, :, 0] = slots
        out[:, :, 1] = self.group_column
        out[:, :, 2] = index
        out[:, :, 3] = blocks
        return out.reshape(-1, 4)


class KVCacheManager:
    """Owns all blocks. A slot's blocks cover the positions from 0 to its last planned token.

    `block_size` is the granule of the prefix hash and divides the block size of every group.
    """

    def __init__(
        self,
        kv: KVCacheConfig,
        *,
        num_slots: int,
        max_model_len: int,
        max_chunk: int,
        enable_caching: bool,
    ) -> None:
        self._num_slots = num_slots
        self._num_groups = len(kv.groups)
        self.enable_caching = enable_caching
        self.pool = BlockPool(kv.num_blocks)
        alike: dict[tuple[int, int | None], list[int]] = {}
        for i, group in enumerate(kv.groups):
            alike.setdefault((group.block_size, reach(group.spec)), []).append(i)
        self.families = [
            _Family(groups, kv.groups[groups[0]], num_slots, max_model_len, max_chunk)
            for groups in alike.values()
        ]
        self.block_size = gcd(*(group.block_size for group in kv.groups))
        self._alignment = lcm(*(group.block_size for group in kv.groups))
        self._windowed = [family for family in self.families if family.reach is not None]

    def blocks_at_peak(self, num_tokens: int) -> int:
        """Most blocks that one request of `num_tokens` holds at once."""
        return sum(
            min(-(-num_tokens // f.block_size), f.most_blocks) * len(f.groups)
            for f in self.families
        )

    # -- prefixes

    def lookup(self, request: Request) -> Hit:
        """The longest cached prefix that leaves a token to compute."""
        if not self.enable_caching or request.wants_prompt_logprobs:
            return _MISS
        length = (request.num_tokens - 1) // self._alignment * self._alignment
        for family in self.families:
            if family.reach is None:
                length = self._prefix_hit(family, request, length)
        before = -1
        while self._windowed and length != before:
            before = length
            for family in self._windowed:
                length = self._window_hit(family, request, length)
        if not length:
            return _MISS
        hashes, index = request.block_hashes, self.pool.index
        blocks = []
        for family in self.families:
            ratio = family.block_size // self.block_size
            names = hashes[ratio - 1 : length // self.block_size : ratio]
            names = names[family.first_needed(length) :]
            blocks.append(
                np.array([[index[name + tag] for name in names] for tag in family.tags], np.int32)
            )
        return Hit(length, blocks)

    def _prefix_hit(self, family: _Family, request: Request, length: int) -> int:
        """The longest hit of at most `length` tokens where all blocks are needed."""
        ratio = family.block_size // self.block_size
        for i in range(length // family.block_size):
            hashes = extend_hashes(request, (i + 1) * ratio, self.block_size)
            if not self._is_cached(family, hashes[(i + 1) * ratio - 1]):
                return i * family.block_size // self._alignment * self._alignment
        return length

    def _window_hit(self, family: _Family, request: Request, length: int) -> int:
        """The longest hit of at most `length` tokens where only the last window is needed."""
        ratio = family.block_size // self.block_size
        hashes = extend_hashes(request, length // self.block_size, self.block_size)
        i = length // family.block_size - 1
        first = family.first_needed(length)
        while i >= first and length:
            if not self._is_cached(family, hashes[(i + 1) * ratio - 1]):
                length = i * family.block_size // self._alignment * self._alignment
                first = family.first_needed(length)
                i = min(i, length // family.block_size)
            i -= 1
        return length

    def _is_cached(self, family: _Family, name: bytes) -> bool:
        index = self.pool.index
        return all(name + tag in index for tag in family.tags)

    def next_hash(self, request: Request, hit: Hit) -> bytes | None:
        """Hash of the granule after the hit; None where the request will not be cached that far."""
        index = hit.num_tokens // self.block_size
        if not self.enable_caching or request.wants_prompt_logprobs:
            return None
        if hit.num_tokens + self._alignment >= request.num_tokens:
            return None
        return extend_hashes(request, index + 1, self.block_size)[index]

    def hashes_touched(self, request: Request, start: int, end: int) -> list[bytes]:
        """Hashes of the granules of known tokens that hold positions from `start` to `end`."""
        if not self.enable_caching:
            return []
        stop = min(-(-end // self.block_size), request.num_tokens // self.block_size)
        return extend_hashes(request, stop, self.block_size)[start // self.block_size : stop]

    # -- blocks

    def enter(self, slot: int, request: Request, hit: Hit, end: int, reserve: int) -> bool:
        """Gives an empty slot the blocks of `hit` and fresh ones up to position `end`.

        False, with nothing changed, where the request's known tokens with `reserve` more blocks
        would not fit: it would soon be preempted.
        """
        pool, num_hit = self.pool, hit.num_tokens
        peak = self.blocks_at_peak(request.num_tokens)
        total = idle = 0
        for family in self.families:
            size = family.block_size
            total += (-(-end // size) - num_hit // size) * len(family.groups)
        if num_hit:
            held = np.concatenate([blocks.ravel() for blocks in hit.blocks])
            idle = int(np.count_nonzero(pool.ref[held] == 0))
            peak = max(peak - len(held), 0)
        wanted = max(peak + reserve, total) + idle
        if wanted > pool.num_available:
            request.num_blocks_wanted = wanted
            return False
        if num_hit:
            pool.touch(held)
        fresh = pool.allocate(total)
        at = 0
        for i, family in enumerate(self.families):
            cached, count = num_hit // family.block_size, -(-end // family.block_size)
            rows, first = family.table[:, slot], 0
            if num_hit:
                first = family.first_needed(num_hit)
                rows[:, :first] = 0
                rows[:, first:cached] = hit.blocks[i]
            n = (count - cached) * len(family.groups)
            rows[:, cached:count] = fresh[at : at + n].reshape(len(family.groups), -1)
            at += n
            family.count[slot] = count
            family.first[slot] = first
            family.num_cached[slot] = cached
        return True

    def table_of(self, slot: int) -> list[list[int]]:
        """Block ids of a slot, a list a group."""
        tables: list[list[int]] = [[]] * self._num_groups
        for family in self.families:
            rows = family.table[:, slot, : family.count[slot]].tolist()
            for group, row in zip(family.groups, rows, strict=True):
                tables[group] = row
        return tables

    def extend(self, slot: int, start: int, end: int) -> tuple[np.ndarray, bool]:
        """Blocks for positions [start, end) of one slot: rows (slot, group, index, block id).

        What fell out of the window is released first (block id 0). False where the rest does not
        fit; then no block is given out.
        """
        parts = [self._trim(family, slot, start) for family in self._windowed]
        counts = [max(-(-end // f.block_size) - int(f.count[slot]), 0) for f in self.families]
        total = sum(n * len(f.groups) for n, f in zip(counts, self.families, strict=True))
        fits = total <= self.pool.num_available
        if fits and total:
            fresh = self.pool.allocate(total)
            at = 0
            for family, n in zip(self.families, counts, strict=True):
                count, size = int(family.count[slot]), n * len(family.groups)
                blocks = fresh[at : at + size].reshape(len(family.groups), n)
                at += size
                family.table[:, slot, count : count + n] = blocks
                family.count[slot] = count + n
                parts.append(family.rows(slot, np.arange(count, count + n), blocks))
        return np.concatenate(parts) if parts else _NO_ROWS, fits

    def _trim(self, family: _Family, slot: int, position: int) -> np.ndarray:
        """Releases the blocks of one slot that no query from `position` on reads.

        With caching they stay until they are findable: another prompt may end where they are.
        """
        first, needed = int(family.first[slot]), family.first_needed(position)
        if self.enable_caching:
            needed = min(needed, int(family.num_cached[slot]))
        if needed <= first:
            return _NO_ROWS
        self.pool.release(family.table[:, slot, first:needed].ravel())
        family.table[:, slot, first:needed] = 0
        family.first[slot] = needed
        return family.rows(slot, np.arange(first, needed), 0)

    def extend_decodes(
        self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """`extend` for many slots that need at most one new block a group.

        `slots`, `starts`, `ends` int32 [n]. Returns the rows and how many of the slots, from the
        first on, got their blocks; the others got none.
        """
        parts = self._trim_decodes(slots, starts) if self._windowed else []
        last = ends - 1
        crossing = [(last // f.block_size >= f.count[slots]).nonzero()[0] for f in self.families]
        total = sum(len(n) * len(f.groups) for n, f in zip(crossing, self.families, strict=True))
        done = len(slots)
        if total > self.pool.num_available:
            wanted = np.zeros(done, np.int64)
            for where, family in zip(crossing, self.families, strict=True):
                wanted[where] += len(family.groups)
            done = int(np.searchsorted(wanted.cumsum(), self.pool.num_available, side="right"))
            crossing = [where[where < done] for where in crossing]
            total = int(wanted[:done].sum())
        if total:
            fresh = self.pool.allocate(total)
            at = 0
            for family, where in zip(self.families, crossing, strict=True):
                if len(where):
                    rows = slots[where]
                    index = family.count[rows]
                    size = len(where) * len(family.groups)
                    blocks = fresh[at : at + size].reshape(len(family.groups), -1)
                    at += size
                    family.table[:, rows, index] = blocks
                    family.count[rows] = index + 1
                    parts.append(family.rows(rows, index, blocks))
        if not parts:
            return _NO_ROWS, done
        return parts[0] if len(parts) == 1 else np.concatenate(parts), done

    def _trim_decodes(self, slots: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
        """`_trim` for many slots of which most are at most one block behind."""
        parts: list[np.ndarray] = []
        for family in self._windowed:
            assert family.reach is not None
            # the first block that is still read; negative while the window is not full
            needed = (starts - (family.reach - 1)) // family.block_size
            if self.enable_caching:
                needed = np.minimum(needed, family.num_cached[slots])
            behind = needed - family.first[slots]
            late = (behind > 0).nonzero()[0]
            if not len(late):
                continue
            for i in late[behind[late] > 1].tolist():
                parts.append(self._trim(family, int(slots[i]), int(starts[i])))
            rows = slots[late[behind[late] == 1]]
            index = family.first[rows]
            self.pool.release_shared(family.table[:, rows, index].ravel())
            family.table[:, rows, index] = 0
            family.first[rows] = index + 1
            parts.append(family.rows(rows, index, 0))
        return parts

    def release(self, slot: int) -> None:
        """Takes everything from a slot. The end of a prefix is reused before its beginning."""
        held, order = [], []
        for family in self.families:
            first, count = int(family.first[slot]), int(family.count[slot])
            held.append(family.table[:, slot, first:count].ravel())
            order.append(family.release_order[:, first:count].ravel())
            family.first[slot] = family.count[slot] = 0
        blocks = held[0] if len(held) == 1 else np.concatenate(held)
        ends = order[0] if len(order) == 1 else np.concatenate(order)
        self.pool.release(blocks[ends.argsort(kind="stable")])

    def commit(self, slot: int, request: Request, end: int) -> None:
        """Positions before `end` are computed: their full blocks become findable."""
        if not self.enable_caching:
            return
        hashes = extend_hashes(request, end // self.block_size, self.block_size)
        for family in self.families:
            full, cached = end // family.block_size, int(family.num_cached[slot])
            if cached < full:
                start = max(cached, int(family.first[slot]))
                ratio = family.block_size // self.block_size
                names = hashes[ratio - 1 : full * ratio : ratio][start:]
                blocks = family.table[:, slot, start:full].tolist()
                for tag, row in zip(family.tags, blocks, strict=True):
                    self.pool.insert([name + tag for name in names], row)
                family.num_cached[slot] = full

    def commit_decodes(self, slots: np.ndarray, hashes: list[bytes], ends: np.ndarray) -> None:
        """`commit` for slots that have just filled one granule, up to `ends`, named by `hashes`."""
        for family in self.families:
            rows, names, full = slots, hashes, ends // family.block_size
            if family.block_size != self.block_size:
                filled = (ends % family.block_size == 0).nonzero()[0]
                rows, full = slots[filled], full[filled]
                names = [hashes[i] for i in filled.tolist()]
            family.num_cached[rows] = full
            there = full > family.first[rows]  # else a tiny window has passed it meanwhile
            if np.count_nonzero(there) < len(rows):
                names = [name for name, keep in zip(names, there, strict=True) if keep]
                rows, full = rows[there], full[there]
            blocks = family.table[:, rows, full - 1].tolist()
            for tag, row in zip(family.tags, blocks, strict=True):
                self.pool.insert([name + tag for name in names], row)

    def forget(self, slot: int) -> None:
        """Makes every block of a slot unfindable: its content is not to be trusted."""
        for family in self.families:
            self.pool.forget(family.table[:, slot, family.first[slot] : family.count[slot]].ravel())

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes; nothing may run."""
        self.pool.forget_all()

    def check_integrity(self, slots: list[int]) -> None:
        """Recounts every reference; `slots` are the ones in use."""
        held = np.zeros(self.pool.num_blocks, np.int64)
        idle = np.ones(self._num_slots, np.bool_)
        idle[slots] = False
        for family in self.families:
            assert not family.count[idle].any(), "an empty slot holds blocks"
            for slot in slots:
                first, count = int(family.first[slot]), int(family.count[slot])
                assert first <= count and not family.table[:, slot, :first].any()
                blocks = family.table[:, slot, first:count]
                assert blocks.all(), "block 0 was given out"
                np.add.at(held, blocks.ravel(), 1)
        self.pool.check_integrity(held)
