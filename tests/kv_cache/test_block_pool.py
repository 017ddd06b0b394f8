# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""BlockPool against a model of lists."""

import random

import numpy as np
import pytest

from llmserve.kv_cache.block_pool import BlockPool


class _Naive:
    """Free blocks in the order in which they go out; dictionaries for the rest."""

    def __init__(self, num_blocks: int) -> None:
        self.ref = dict.fromkeys(range(1, num_blocks), 0)
        self.empty = set(self.ref)
        self.lru: list[int] = []
        self.key: dict[int, tuple[bytes, int]] = {}  # name and group

    def allocated(self, blocks: list[int]) -> int:
        """Checks that `blocks` may be given out; returns how many were evicted."""
        num_empty = min(len(self.empty), len(blocks))
        assert set(blocks[:num_empty]) <= self.empty and len(set(blocks)) == len(blocks)
        assert blocks[num_empty:] == self.lru[: len(blocks) - num_empty]
        self.empty -= set(blocks[:num_empty])
        del self.lru[: len(blocks) - num_empty]
        for block in blocks:
            self.ref[block] = 1
            self.key.pop(block, None)
        return len(blocks) - num_empty

    def insert(self, names: list[bytes], groups: list[int], blocks: list[list[int]]) -> None:
        for name, row in zip(names, blocks, strict=True):
            for group, block in zip(groups, row, strict=True):
                if block and block not in self.key and (name, group) not in self.key.values():
                    self.key[block] = name, group

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.ref[block]:
                self.lru.remove(block)
            self.ref[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.ref[block] -= 1
            if not self.ref[block]:
                if block in self.key:
                    self.lru.append(block)
                else:
                    self.empty.add(block)


@pytest.mark.parametrize("seed", range(4))
def test_against_lists(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice((6, 20, 50))
    pool, naive = BlockPool(n, 3), _Naive(n)
    evicted = hits = revived = twice = 0
    held: list[int] = []  # a block as often as it has references
    for step in range(3000):
        what = rng.random()
        if what < 0.35 and (most := pool.num_available):
            blocks = pool.allocate(rng.randint(1, most)).tolist()
            evicted += naive.allocated(blocks)
            held += blocks
        elif what < 0.7 and held:
            part = rng.sample(sorted(set(held)), rng.randint(1, len(set(held))))
            pool.release(np.array(part, np.int32))
            naive.release(part)
            for block in part:
                held.remove(block)
        elif what < 0.75 and held:
            part = rng.sample(held, rng.randint(1, len(held)))  # with repetitions
            order = [b for b in naive.ref if b in part]
            pool.release_shared(np.array(part, np.int32))
            gone = [b for b in order if naive.ref[b] == part.count(b)]
            for block in part:
                held.remove(block)
                naive.ref[block] -= 1
            last = {block: i for i, block in enumerate(part)}
            for block in sorted(gone, key=lambda b: last[b]):
                naive.ref[block] = 1
                naive.release([block])
        elif what < 0.85 and held:
            count, groups = rng.choice((1, 1, 4)), rng.choice(([0], [1, 2], [2, 0]))
            names = [str(rng.randrange(30)).encode() for _ in range(count)]
            room = count * len(groups)
            part = rng.sample(sorted(set(held)), min(room, len(set(held))))
            part += [0] * (room - len(part))
            rng.shuffle(part)
            rows = [part[i : i + len(groups)] for i in range(0, room, len(groups))]
            pool.insert(names, np.array(groups), np.array(rows))
            naive.insert(names, groups, rows)
            twice += len(set(names)) < count
        elif what < 0.95 and naive.key:
            found = rng.sample(sorted(naive.key), rng.randint(1, len(naive.key)))
            for block in found:
                name, group = naive.key[block]
                assert pool.find(name)[group] == block
            hits += len(found)
            revived += sum(naive.ref[b] == 0 for b in found)
            pool.touch(np.array(found, np.int32))
            naive.touch(found)
            held += found
        elif held:
            block = rng.choice(held)
            pool.forget(np.array([block]))
            naive.key.pop(block, None)
        assert pool.num_available == len(naive.empty) + len(naive.lru)
        assert pool.num_cached_free == len(naive.lru)
        assert {
            block: (name, group)
            for name in pool.index
            for group, block in enumerate(pool.find(name))
            if block
        } == naive.key
        if step % 20 == 0:
            pool.check_integrity(np.bincount(held, minlength=n))
    assert evicted > 40 and hits > 100 and revived > 20 and twice > 5


def test_least_recently_used_goes_first_and_empty_before_cached() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    assert sorted(blocks.tolist()) == [1, 2, 3, 4]
    a, b, c, _ = blocks.tolist()
    pool.insert([b"a", b"b", b"c"], np.array([0]), np.array([[a], [b], [c]]))
    for block in (b, a, c):
        pool.release(np.array([block]))
    pool.touch(np.array([b]))
    pool.release(np.array([b]))
    pool.release(blocks[3:])
    assert pool.allocate(4).tolist() == [blocks[3], a, c, b]
    assert not pool.index


@pytest.mark.parametrize("wrong", ["lost", "twice", "count", "index", "cell", "row"])
def test_check_integrity_sees(wrong: str) -> None:
    pool = BlockPool(6)
    blocks = pool.allocate(3)
    pool.insert([b"a"], np.array([0]), blocks[:1, None])
    held = np.bincount(blocks, minlength=6)
    pool.check_integrity(held)
    if wrong == "lost":
        pool.num_empty -= 1
    elif wrong == "twice":
        pool._put_back(np.array([pool._empty[0]]))
    elif wrong == "count":
        pool.ref[blocks[0]] += 1
    elif wrong == "cell":
        pool._cells[pool._cell_of[blocks[0]]] = 0
    elif wrong == "row":
        pool._free_rows.pop()
    else:
        pool.index[b"x"] = 2
    with pytest.raises(AssertionError):
        pool.check_integrity(held)


def test_forget_all() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.insert([b"a", b"b"], np.array([0]), blocks[:2, None])
    pool.release(blocks)
    pool.forget_all()
    assert not pool.index and pool.num_empty == 3 and pool.num_cached_free == 0
    pool.check_integrity(np.zeros(4, np.int64))
