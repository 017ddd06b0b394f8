# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The seeded simulation, and the bugs that it must find."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmserve.kv_cache import manager, prefix_hash
from llmserve.kv_cache.block_pool import BlockPool
from llmserve.kv_cache.groups import reach
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.scheduler.scheduler import Scheduler
from tests.helpers.simulation import World, num_events, simulate


def _check(events: int, seed: int) -> None:
    counts = simulate(events, seed)
    assert num_events(counts) >= events
    per_event = {  # that it happened, and not just once: events for each time
        "stop": 2000, "length": 100, "abort": 1000, "error numerical_error": 20_000,
        "num_preemptions": 2000, "prefix_hits": 100, "num_chunked_prefills": 500,
        "num_wasted_tokens": 2000, "num_late_results": 2000, "restarts": 50_000,
        "resets": 50_000, "accepted drafts": 200, "num_dropped_events": 5000,
    }  # fmt: skip
    assert {n: counts[n] for n, each in per_event.items() if counts[n] < events // each} == {}
    assert counts["max_in_flight"] == 3
    assert counts["max preemptions"] <= 8


def test_random_worlds() -> None:
    _check(200_000, 1)


@pytest.mark.long
def test_a_million_events() -> None:
    _check(1_000_000, 10_000)


Patch = pytest.MonkeyPatch


def _commit(kv: KVCacheManager, slot: int, request: Any, start: int, end: int) -> None:
    """Blocks of known tokens with positions from `start` to `end` become findable."""
    size = kv.block_size
    first, last = start // size, min(end, request.num_tokens) // size
    if last > first and kv.enable_caching:
        hashes = prefix_hash.extend_hashes(request, last, size)[first:last]
        kv.commit([slot] * (last - first), hashes, list(range(first + 1, last + 1)))


def _insert_when_planned(patch: Patch) -> None:
    add_row = Scheduler._add_row

    def added(self: Scheduler, rows: Any, request: Any, start: int, count: int) -> Any:
        add_row(self, rows, request, start, count)
        _commit(self.kv, request.slot, request, start, start + count)

    patch.setattr(Scheduler, "_add_row", added)


def _free_while_shared(patch: Patch) -> None:
    def release(self: BlockPool, blocks: np.ndarray) -> None:
        self.ref[blocks] = 0
        self._put_back(blocks)

    patch.setattr(BlockPool, "release", release)


def _departed_forgotten(patch: Patch) -> None:
    leave = Scheduler._leave

    def left(self: Scheduler, request: Any) -> None:
        leave(self, request)
        request.num_in_flight = 0
        for flight in self._in_flight:
            flight.departed.clear()

    patch.setattr(Scheduler, "_leave", left)


def _window_one_short(patch: Patch) -> None:
    patch.setattr(manager, "reach", lambda spec: (n := reach(spec)) and n - 1)


def _salt_forgotten(patch: Patch) -> None:
    root = prefix_hash.root_hash
    patch.setattr(prefix_hash, "root_hash", lambda salt: root(""))


def _parent_forgotten(patch: Patch) -> None:
    block = prefix_hash.block_hash
    patch.setattr(prefix_hash, "block_hash", lambda parent, tokens: block(bytes(32), tokens))


def _resumed_in_flight(patch: Patch) -> None:
    leave = Scheduler._leave

    def left(self: Scheduler, request: Any) -> None:
        leave(self, request)
        request.num_in_flight = 0

    patch.setattr(Scheduler, "_leave", left)


def _nan_cached(patch: Patch) -> None:
    def keep(self: KVCacheManager, slot: int) -> None:
        owner = keep_scheduler[-1]
        request = owner._request_in(slot)
        _commit(self, slot, request, 0, int(owner.slots.computed[slot]))

    keep_scheduler: list[Scheduler] = []
    fail = Scheduler._fail

    def failing(self: Scheduler, request: Any, invalid: int) -> None:
        keep_scheduler.append(self)
        fail(self, request, invalid)

    patch.setattr(KVCacheManager, "forget", keep)
    patch.setattr(Scheduler, "_fail", failing)


def _blocks_kept(patch: Patch) -> None:
    leave, release = Scheduler._leave, KVCacheManager.release

    def left(self: Scheduler, request: Any) -> None:
        if request.finish_reason == "abort":
            patch.setattr(KVCacheManager, "release", lambda *_: None)
        leave(self, request)
        patch.setattr(KVCacheManager, "release", release)

    patch.setattr(Scheduler, "_leave", left)


def _new_block_untold(patch: Patch) -> None:
    extend = KVCacheManager.extend_decodes

    def extended(self: KVCacheManager, *args: Any) -> Any:
        rows, done = extend(self, *args)
        return rows[1:], done

    patch.setattr(KVCacheManager, "extend_decodes", extended)


def _drafts_kept(patch: Patch) -> None:
    tokens = Scheduler._commit_tokens

    def committed(self: Scheduler, flight: Any, *drawn: Any) -> Any:
        before = self.slots.computed[flight.slots]
        finished = tokens(self, flight, *drawn)
        if self._num_drafts:
            self.slots.computed[flight.slots] = before
        return finished

    patch.setattr(Scheduler, "_commit_tokens", committed)


def _hit_includes_last_token(patch: Patch) -> None:
    lookup = KVCacheManager.lookup

    def looked(self: KVCacheManager, request: Any) -> Any:
        request.tokens += bytes(4)
        hit = lookup(self, request)
        del request.tokens[-4:]
        return hit

    patch.setattr(KVCacheManager, "lookup", looked)


def _min_tokens_ignored(patch: Patch) -> None:
    end_of = Scheduler._end_of

    def ended(self: Scheduler, request: Any, token: int, num_tokens: int) -> Any:
        request.params = request.params.clone(min_tokens=0)
        return end_of(self, request, token, num_tokens)

    patch.setattr(Scheduler, "_end_of", ended)


_NAN = World(nan_rate=0.05, room=8.0, num_contents=1)


@pytest.mark.parametrize(
    "plant",
    [
        _insert_when_planned, _free_while_shared, _departed_forgotten, _window_one_short,
        _salt_forgotten, _parent_forgotten, _resumed_in_flight, _nan_cached, _blocks_kept,
        _new_block_untold, _drafts_kept, _hit_includes_last_token, _min_tokens_ignored,
    ],
)  # fmt: skip
def test_planted_bugs_are_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        simulate(60_000, 1, only=_NAN if plant is _nan_cached else None)
    assert any("seed" in note for note in caught.value.__notes__)
