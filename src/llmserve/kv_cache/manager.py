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

_ZERO, _ONE = np.array(0), np.array(1)  # numpy is slower with Python integers
NO_ROWS = np.empty((0, 4), np.int32)  # of SchedulerOutput.new_blocks


@dataclass(slots=True, frozen=True)
class Hit:
    """A cached prefix; `blocks[f]` int64 [blocks, groups of family f], 0 where no query reads."""

    num_tokens: int
    blocks: list[np.ndarray]


_MISS = Hit(0, [])


class _Kind:
    """KV groups with equal block size and reach: they are cached, and shrink, alike."""

    def __init__(
        self, groups: list[int], kind: KVGroup, num_slots: int, max_model_len: int, max_chunk: int
    ) -> None:
        self.groups = groups
        self.block_size = kind.block_size
        self.reach = reach(kind.spec)
        self.size, self.before = np.array(kind.block_size), np.array((self.reach or 1) - 1)
        self.first = np.zeros(num_slots, np.int64)  # a slot's entries before it are 0
        self.columns = slice(0, 0)  # of the family's table
        self.most_blocks = blocks_at_peak(kind, max_model_len, max_chunk)

    def first_needed(self, position: int) -> int:
        """Index of the first block that a query at `position` reads."""
        return 0 if self.reach is None else max(position - self.reach + 1, 0) // self.block_size


class _Family:
    """Block tables of the KV groups with equal block size: they grow alike."""

    def __init__(self, kinds: list[_Kind], num_slots: int, max_model_len: int) -> None:
        self.kinds = kinds
        self.windows = [kind for kind in kinds if kind.reach is not None]
        self.group_ids = [group for kind in kinds for group in kind.groups]
        self.groups = np.array(self.group_ids)
        self.block_size, self.size = kinds[0].block_size, kinds[0].size
        width = -(-max_model_len // self.block_size)
        self.width = np.array(width)
        self.table = np.zeros((num_slots, width, len(self.groups)), np.int64)
        # by group and flat place: indexing with one array is several times faster than with two
        self.by_place = self.table.reshape(-1, len(self.groups))
        self.flat = [self.by_place[:, column] for column in range(len(self.groups))]
        self.covered = np.zeros(num_slots, np.int64)  # positions that the entries in use hold
        self.num_cached = np.zeros(num_slots, np.int64)  # blocks that were made findable
        at = 0
        for kind in kinds:
            kind.columns = slice(at, at + len(kind.groups))
            at += len(kind.groups)

    def count(self, slot: int) -> int:
        """Entries of the slot that are in use."""
        return self.covered.item(slot) // self.block_size

    def rows(
        self,
        slots: np.ndarray | int,
        index: np.ndarray,
        blocks: np.ndarray | int,
        columns: slice = slice(None),
    ) -> np.ndarray:
        """Rows of SchedulerOutput.new_blocks; `blocks` [n, num groups] or 0."""
        groups = self.groups[columns]
        out = np.empty((4, len(index), len(groups)), np.int32)
        out[0] = slots[:, None] if isinstance(slots, np.ndarray) else slots
        out[1] = groups
        out[2] = index[:, None]
        out[3] = blocks
        return out.reshape(4, -1).T


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
        self.pool = BlockPool(kv.num_blocks, len(kv.groups))
        alike: dict[int, dict[int | None, list[int]]] = {}
        for i, group in enumerate(kv.groups):
            alike.setdefault(group.block_size, {}).setdefault(reach(group.spec), []).append(i)
        self.families: list[_Family] = []
        for by_reach in alike.values():
            kinds = [
                _Kind(groups, kv.groups[groups[0]], num_slots, max_model_len, max_chunk)
                for groups in by_reach.values()
            ]
            self.families.append(_Family(kinds, num_slots, max_model_len))
        self._kinds = [kind for family in self.families for kind in family.kinds]
        self.block_size = gcd(*(group.block_size for group in kv.groups))
        self._alignment = lcm(*(group.block_size for group in kv.groups))
        self._windows = [kind for kind in self._kinds if kind.reach is not None]
        # the first position from which on some block is no longer read
        self.first_past = min(
            (kind.block_size + kind.reach - 1 for kind in self._kinds if kind.reach), default=2**62
        )
        self._peaks = [(k.block_size, k.most_blocks, len(k.groups)) for k in self._kinds]

    def blocks_at_peak(self, num_tokens: int) -> int:
        """Most blocks that one request of `num_tokens` holds at once."""
        total = 0
        for block_size, most, num_groups in self._peaks:
            blocks = -(-num_tokens // block_size)
            total += (blocks if blocks < most else most) * num_groups
        return total

    # -- prefixes

    def lookup(self, request: Request) -> Hit:
        """The longest cached prefix that leaves a token to compute."""
        if not self.enable_caching or request.wants_prompt_logprobs:
            return _MISS
        length = (request.num_tokens - 1) // self._alignment * self._alignment
        for kind in self._kinds:
            if kind.reach is None:
                length = self._prefix_hit(kind, request, length)
        before = 0 if length == 0 else -1
        while self._windows and length != before:
            before = length
            for kind in self._windows:
                length = self._window_hit(kind, request, length)
        if not length:
            return _MISS
        hashes = request.block_hashes
        blocks = []
        for family in self.families:
            ratio = family.block_size // self.block_size
            names = hashes[ratio - 1 : length // self.block_size : ratio]
            first = min(kind.first_needed(length) for kind in family.kinds)
            table = np.zeros((len(names), len(family.groups)), np.int64)
            table[first:] = self.pool.find_all(names[first:])[:, family.groups]
            for kind in family.windows:
                table[: kind.first_needed(length), kind.columns] = 0
            blocks.append(table)
        return Hit(length, blocks)

    def _prefix_hit(self, kind: _Kind, request: Request, length: int) -> int:
        """The longest hit of at most `length` tokens where all blocks are needed."""
        ratio = kind.block_size // self.block_size
        for i in range(length // kind.block_size):
            hashes = extend_hashes(request, (i + 1) * ratio, self.block_size)
            if not self._is_cached(kind, hashes[(i + 1) * ratio - 1]):
                return i * kind.block_size // self._alignment * self._alignment
        return length

    def _window_hit(self, kind: _Kind, request: Request, length: int) -> int:
        """The longest hit of at most `length` tokens where only the last window is needed."""
        ratio = kind.block_size // self.block_size
        hashes = extend_hashes(request, length // self.block_size, self.block_size)
        i = length // kind.block_size - 1
        first = kind.first_needed(length)
        while i >= first and length:
            if not self._is_cached(kind, hashes[(i + 1) * ratio - 1]):
                length = i * kind.block_size // self._alignment * self._alignment
                first = kind.first_needed(length)
                i = min(i, length // kind.block_size)
            i -= 1
        return length

    def _is_cached(self, kind: _Kind, name: bytes) -> bool:
        blocks = self.pool.find(name)
        return all([blocks[group] for group in kind.groups])

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
            held = np.concatenate([blocks[blocks > 0] for blocks in hit.blocks])
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
            table = family.table[slot]
            if num_hit:
                table[:cached] = hit.blocks[i]
            n = (count - cached) * len(family.groups)
            table[cached:count] = fresh[at : at + n].reshape(-1, len(family.groups))
            at += n
            family.covered[slot] = count * family.block_size
            family.num_cached[slot] = cached
            for kind in family.windows:
                kind.first[slot] = kind.first_needed(num_hit)
        return True

    def table_of(self, slot: int) -> list[list[int]]:
        """Block ids of a slot, a list a group."""
        tables: list[list[int]] = [[]] * self._num_groups
        for family in self.families:
            count = family.count(slot)
            rows = family.table[slot, :count].T.tolist()
            for group, row in zip(family.group_ids, rows, strict=True):
                tables[group] = row
        return tables

    def extend(self, slot: int, start: int, end: int) -> tuple[np.ndarray, bool]:
        """Blocks for positions [start, end) of one slot: rows (slot, group, index, block id).

        Where it needs some, what fell out of the window is released first (block id 0), which costs
        less than to look for it at every token. False where the rest does not fit; then no block is
        given out.
        """
        parts: list[np.ndarray] = []
        counts: list[int] = []
        total = 0
        for family in self.families:
            n = max(-(-(end - family.covered.item(slot)) // family.block_size), 0)
            counts.append(n)
            total += n * len(family.groups)
            if n:
                parts += [self._trim(family, kind, slot, start) for kind in family.windows]
        fits = total <= self.pool.num_available
        if fits and total:
            fresh = self.pool.allocate(total)
            at = 0
            for family, n in zip(self.families, counts, strict=True):
                count = family.count(slot)
                size = n * len(family.groups)
                blocks = fresh[at : at + size].reshape(n, len(family.groups))
                at += size
                family.table[slot, count : count + n] = blocks
                family.covered[slot] += n * family.block_size
                parts.append(family.rows(slot, np.arange(count, count + n), blocks))
        return np.concatenate(parts) if parts else NO_ROWS, fits

    def trim(self, slot: int, position: int) -> np.ndarray:
        """Releases what no query from `position` on reads, as after a chunk of a prompt; the rows
        that say so."""
        parts = [
            self._trim(family, kind, slot, position)
            for family in self.families
            for kind in family.windows
        ]
        return np.concatenate(parts) if parts else NO_ROWS

    def _trim(self, family: _Family, kind: _Kind, slot: int, position: int) -> np.ndarray:
        """Releases the blocks of one slot that no query from `position` on reads.

        With caching they stay until they are findable: another prompt may end where they are.
        """
        first, needed = int(kind.first[slot]), kind.first_needed(position)
        if self.enable_caching:
            needed = min(needed, int(family.num_cached[slot]))
        if needed <= first:
            return NO_ROWS
        passed = family.table[slot, first:needed, kind.columns]
        self.pool.release(passed.T.ravel())
        passed[:] = 0
        kind.first[slot] = needed
        return family.rows(slot, np.arange(first, needed), 0, kind.columns)

    def extend_decodes(
        self, slots: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """`extend` for many slots that need at most one new block a group.

        `slots`, `starts`, `ends` int64 [n]. Returns the rows and how many of the slots, from the
        first on, got their blocks; the others got none.
        """
        done = len(slots)
        crossing = [(ends > f.covered[slots]).nonzero()[0] for f in self.families]
        total = 0
        parts: list[np.ndarray] = []
        for where, family in zip(crossing, self.families, strict=True):
            if len(where):
                total += len(where) * len(family.groups)
                for kind in family.windows:
                    self._trim_decodes(family, kind, slots[where], starts[where], parts)
        if not total:
            return NO_ROWS, done
        if total > self.pool.num_available:
            wanted = np.zeros(done, np.int64)
            for where, family in zip(crossing, self.families, strict=True):
                wanted[where] += len(family.groups)
            done = int(np.searchsorted(wanted.cumsum(), self.pool.num_available, side="right"))
            crossing = [where[where < done] for where in crossing]
            total = int(wanted[:done].sum())
        fresh = self.pool.allocate(total)
        at = 0
        for family, where in zip(self.families, crossing, strict=True):
            if len(where):
                rows = slots[where]
                covered = family.covered[rows]
                index = covered // family.size
                size = len(where) * len(family.groups)
                blocks = fresh[at : at + size].reshape(len(where), -1)
                at += size
                family.by_place[rows * family.width + index] = blocks
                family.covered[rows] = covered + family.size
                parts.append(family.rows(rows, index, blocks))
        if not parts:
            return NO_ROWS, done
        return parts[0] if len(parts) == 1 else np.concatenate(parts), done

    def _trim_decodes(
        self,
        family: _Family,
        kind: _Kind,
        slots: np.ndarray,
        starts: np.ndarray,
        parts: list[np.ndarray],
    ) -> None:
        """`_trim` for many slots of which most are at most one block behind."""
        # the first block that is still read; negative while the window is not full
        needed = (starts - kind.before) // kind.size
        if self.enable_caching:
            needed = np.minimum(needed, family.num_cached[slots])
        behind = needed - kind.first[slots]
        for i in (behind > _ONE).nonzero()[0].tolist():
            parts.append(self._trim(family, kind, int(slots[i]), int(starts[i])))
        rows = slots[(behind == _ONE).nonzero()[0]]
        if not len(rows):
            return
        index = kind.first[rows]
        place = rows * family.width + index
        self.pool.release_shared(family.by_place.take(place, axis=0)[:, kind.columns].T.ravel())
        for column in family.flat[kind.columns]:
            column[place] = _ZERO
        kind.first[rows] = index + _ONE
        parts.append(family.rows(rows, index, 0, kind.columns))

    def release(self, slot: int) -> None:
        """Takes everything from a slot. The end of a prefix is reused before its beginning."""
        held, order, passed = [], [], False
        for family in self.families:
            count = family.count(slot)
            held.append(family.table[slot, :count][::-1].ravel())
            if len(self.families) > 1:
                starts = np.arange(count - 1, -1, -1) * -family.block_size
                order.append(starts.repeat(len(family.groups)))
            family.covered[slot] = 0
            for kind in family.windows:
                passed |= kind.first.item(slot) > 0
                kind.first[slot] = 0
        blocks = held[0]
        if order:
            blocks = np.concatenate(held)[np.concatenate(order).argsort(kind="stable")]
        if passed:
            blocks = blocks[blocks > 0]
        self.pool.release(blocks)

    def commit(self, slots: list[int], hashes: list[bytes], granules: list[int]) -> None:
        """Granules that slots have just filled become findable.

        `granules` number them from 1 on, those of one slot in order and none left out; `hashes` are
        their names.
        """
        all_slots, all_full = np.array(slots), np.array(granules)
        for family in self.families:
            rows, names, full = all_slots, hashes, all_full
            ratio = family.block_size // self.block_size
            if ratio > 1:
                filled = (full % ratio == 0).nonzero()[0]
                rows, full = rows[filled], full[filled] // ratio
                names = [hashes[i] for i in filled.tolist()]
            family.num_cached[rows] = full
            # what a window has passed is 0
            blocks = family.by_place.take(rows * family.width + full - _ONE, axis=0)
            self.pool.insert(names, family.groups, blocks)

    def forget(self, slot: int) -> None:
        """Makes every block of a slot unfindable: its content is not to be trusted."""
        for family in self.families:
            count = family.count(slot)
            blocks = family.table[slot, :count].ravel()
            self.pool.forget(blocks[blocks > 0])

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes; nothing may run."""
        self.pool.forget_all()

    def check_integrity(self, slots: list[int]) -> None:
        """Recounts every reference; `slots` are the ones in use."""
        held = np.zeros(self.pool.num_blocks, np.int64)
        idle = np.ones(self._num_slots, np.bool_)
        idle[slots] = False
        for family in self.families:
            assert not family.covered[idle].any(), "an empty slot holds blocks"
            for slot in slots:
                blocks = family.table[slot, : family.count(slot)]
                for kind in family.kinds:
                    first = int(kind.first[slot])
                    assert first <= len(blocks) and not blocks[:first, kind.columns].any()
                    assert blocks[first:, kind.columns].all(), "block 0 was given out"
                np.add.at(held, blocks[blocks > 0], 1)
        self.pool.check_integrity(held)
