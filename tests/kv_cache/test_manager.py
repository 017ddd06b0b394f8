# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""KVCacheManager: hits against trying every length, tables against what they should hold."""

import random

import numpy as np
import pytest

from llmserve.core.kv_spec import (
    AnyKVSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVGroup,
    MLASpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
)
from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.kv_cache.prefix_hash import extend_hashes

FULL, MLA, STATE = FullAttentionSpec(1, 8, 2), MLASpec(8, 8, 2), RecurrentStateSpec(128)
MIXES: dict[str, list[tuple[AnyKVSpec, int]]] = {
    "full": [(FULL, 4)],
    "mla": [(MLA, 4)],
    "window": [(SlidingWindowSpec(1, 8, 2, window=6), 4)],
    "state": [(STATE, 4)],
    "hybrid": [(FULL, 4), (SlidingWindowSpec(1, 8, 2, window=9), 4)],
    "sizes": [(FULL, 8), (SlidingWindowSpec(1, 8, 2, window=5), 4), (MLA, 12)],
    "all": [(FULL, 4), (STATE, 8), (SlidingWindowSpec(1, 8, 2, window=7), 4)],
}


def _manager(mix: str, num_blocks: int = 200, caching: bool = True) -> KVCacheManager:
    groups = tuple(KVGroup(spec, (i,), size) for i, (spec, size) in enumerate(MIXES[mix]))
    return KVCacheManager(
        KVCacheConfig(num_blocks, 128, 1, groups),
        num_slots=9, max_model_len=128, max_chunk=64, enable_caching=caching,
    )  # fmt: skip


def _request(tokens: list[int], salt: str = "", **params: object) -> Request:
    message = EngineRequest(
        client=0, request_id=1, prompt=np.array(tokens, np.int32).tobytes(),
        params=SamplingParams(**params), arrival=0.0, cache_salt=salt,  # type: ignore[arg-type]
    )  # fmt: skip
    return Request(message, 128, frozenset())


def _run(kv: KVCacheManager, slot: int, request: Request) -> int:
    """All of a request in one step; returns how much of it was cached."""
    hit = kv.lookup(request)
    assert kv.enter(slot, request, hit, request.num_tokens, 0)
    _commit(kv, slot, request, hit.num_tokens, request.num_tokens)
    return hit.num_tokens


def _commit(kv: KVCacheManager, slot: int, request: Request, start: int, end: int) -> None:
    """Positions from `start` to `end` are computed."""
    size = kv.block_size
    hashes = extend_hashes(request, end // size, size)[start // size : end // size]
    if hashes and kv.enable_caching:
        granules = range(start // size + 1, end // size + 1)
        kv.commit([slot] * len(hashes), hashes, list(granules))


def _longest(kv: KVCacheManager, request: Request) -> int:
    """By trying each length: every group must find the blocks that the next query reads."""
    hashes = request.block_hashes
    for length in range(request.num_tokens - 1, 0, -1):
        fits = True
        for g, (spec, size) in enumerate(MIXES["now"]):
            first = 0
            if isinstance(spec, SlidingWindowSpec):
                first = max(length - spec.window + 1, 0) // size
            elif isinstance(spec, RecurrentStateSpec):
                first = (length - 1) // size
            names = [
                hashes[(i + 1) * size // kv.block_size - 1] for i in range(first, length // size)
            ]
            fits &= length % size == 0 and all(kv.pool.find(name)[g] for name in names)
        if fits:
            return length
    return 0


@pytest.mark.parametrize("mix", [name for name in MIXES if name != "now"])
def test_hits_are_the_longest(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXES, "now", MIXES[mix])
    rng = random.Random(mix)
    kv = _manager(mix)
    shared = [[rng.randrange(9) for _ in range(120)] for _ in range(2)]
    found: list[int] = []
    for _ in range(150):
        tokens = rng.choice(shared)[: rng.randint(1, 110)]
        tokens = tokens + [rng.randrange(9) for _ in range(rng.randint(1, 10))]
        request = _request(tokens)
        hit = kv.lookup(request)
        kv.hashes_touched(request, 0, len(tokens))
        assert hit.num_tokens == _longest(kv, request)
        found.append(hit.num_tokens)
        _run(kv, 1, request)
        kv.check_integrity([1])
        kv.release(1)
        if rng.random() < 0.3 and kv.pool.num_cached_free > 60:  # evict something
            kv.pool.release(kv.pool.allocate(kv.pool.num_empty + rng.randint(1, 60)))
    assert len(set(found)) > 4 and max(found) > 40


def test_tables_share_the_prefix_and_nothing_else() -> None:
    kv = _manager("hybrid")
    a, b = _request(list(range(30))), _request(list(range(22)) + [99] * 8)
    assert (_run(kv, 1, a), _run(kv, 2, b)) == (0, 20)
    full, window = zip(kv.table_of(1), kv.table_of(2), strict=True)
    assert full[0][:5] == full[1][:5] and not set(full[0][5:]) & set(full[1][5:])
    # the query at 20 reads from 12 on: blocks 3 and 4
    assert window[1][:3] == [0, 0, 0] and window[1][3:5] == window[0][3:5]
    kv.check_integrity([1, 2])


def test_the_last_token_is_always_computed() -> None:
    kv = _manager("full")
    assert [_run(kv, slot, _request(list(range(16)))) for slot in (1, 2)] == [0, 12]
    assert kv.lookup(_request(list(range(17)))).num_tokens == 16


def test_who_reads_no_cache() -> None:
    kv = _manager("full")
    tokens = list(range(16))
    _run(kv, 1, _request(tokens))
    scored = _request(tokens, prompt_logprobs=1)
    assert kv.lookup(scored).num_tokens == 0
    scored.prompt_logprobs_done = 15
    assert kv.lookup(scored).num_tokens == 12
    assert kv.lookup(_request(tokens, salt="x")).num_tokens == 0
    kv = _manager("full", caching=False)
    assert [_run(kv, slot, _request(tokens)) for slot in (1, 2)] == [0, 0]


def test_forgotten_blocks_are_not_found() -> None:
    kv = _manager("all")
    tokens = list(range(40))
    _run(kv, 1, _request(tokens))
    assert kv.lookup(_request(tokens)).num_tokens == 32
    kv.forget(1)
    assert kv.lookup(_request(tokens)).num_tokens == 0
    kv.release(1)
    assert kv.pool.num_empty == 199


@pytest.mark.parametrize("mix", ["hybrid", "sizes", "all"])
def test_decodes_in_bulk_equal_decodes_one_by_one(mix: str) -> None:
    """Tables, told rows and free counts; windows move on, blocks are shared."""
    rng = random.Random(5)
    bulk, single = _manager(mix), _manager(mix)
    lengths = [rng.randint(1, 60) for _ in range(6)] + [60, 60]
    requests = [_request(list(range(128))) for _ in lengths]
    for kv in (bulk, single):
        for slot, length in enumerate(lengths, 1):
            _run(kv, slot, _request(list(range(length))))
    slots = np.arange(1, 9, dtype=np.int32)
    starts = np.array(lengths, np.int32)
    freed = 0
    for _ in range(40):
        rows, done = bulk.extend_decodes(slots, starts, starts + 1)
        assert done == 8
        expected: dict[tuple[int, int, int], bool] = {}
        for slot, start in zip(slots.tolist(), starts.tolist(), strict=True):
            told, fits = single.extend(slot, start, start + 1)
            assert fits
            expected |= {(s, g, i): block > 0 for s, g, i, block in told.tolist()}
        assert {(s, g, i): block > 0 for s, g, i, block in rows.tolist()} == expected
        freed += sum(not there for there in expected.values())
        for s, g, i, block in rows.tolist():
            assert bulk.table_of(s)[g][i] == block
        for slot in slots.tolist():
            assert [[b > 0 for b in t] for t in bulk.table_of(slot)] == [
                [b > 0 for b in t] for t in single.table_of(slot)
            ]
        assert bulk.pool.num_available == single.pool.num_available
        bulk.check_integrity(slots.tolist())
        starts += 1
        for kv in (bulk, single):
            for slot, end, request in zip(slots.tolist(), starts.tolist(), requests, strict=True):
                _commit(kv, slot, request, end - 1, end)
    assert freed > 20


def test_no_room() -> None:
    kv = _manager("full", num_blocks=9)
    assert _run(kv, 1, _request(list(range(16)))) == 0
    big = _request([7] * 20)
    assert not kv.enter(2, big, kv.lookup(big), 4, 0), "its five blocks do not fit"
    assert big.num_blocks_wanted == 5 and kv.pool.num_available == 4
    small = _request([7] * 12)
    assert not kv.enter(2, small, kv.lookup(small), 12, 2), "two more are asked for"
    assert kv.enter(2, small, kv.lookup(small), 12, 1)
    slots, starts = np.array([1, 2], np.int32), np.array([16, 12], np.int32)
    rows, done = kv.extend_decodes(slots, starts, starts + 1)
    assert done == 1 and rows[:, 0].tolist() == [1]
    assert not kv.extend(2, 12, 13)[1]
    kv.check_integrity([1, 2])


def test_a_decode_fills_blocks_of_every_group() -> None:
    kv = _manager("sizes")
    request = _request(list(range(23)))
    _run(kv, 1, request)
    kv.extend_decodes(*(np.array([n], np.int32) for n in (1, 23, 24)))
    request.tokens += np.array([23], np.int32).tobytes()
    other = _request([*range(24), 1])
    assert kv.lookup(other).num_tokens == 0
    kv.hashes_touched(request, 0, 24)
    kv.commit([1], request.block_hashes[-1:], [24 // kv.block_size])
    assert kv.lookup(other).num_tokens == 24
