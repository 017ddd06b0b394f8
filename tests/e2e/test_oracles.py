# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The same request gives the same tokens, however it was scheduled.

A tiny random model in float32 on the CPU, through the real scheduler, cache and runner. Every test
asserts from counters that what it is about has happened, and each is shown to notice a planted bug.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from llmserve.core.scheduler_output import NewRequest, SchedulerOutput
from llmserve.engine import core
from llmserve.errors import ConfigError
from llmserve.kv_cache import prefix_hash
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.kv_cache.prefix_hash import digest
from llmserve.scheduler import scheduler
from llmserve.scheduler.scheduler import Scheduler
from llmserve.worker.input_batch import InputBatcher, StepInputs
from llmserve.worker.request_slots import RequestSlots
from tests.helpers.engine import Engine
from tests.helpers.tiny_models import write_tiny_model

FAMILIES = ("llama", "gemma3")  # full attention alone, and the hybrid with a window
_RNG = np.random.default_rng()


def _prompt(length: int) -> list[int]:
    return _RNG.integers(5, 120, length).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp(request.param), request.param, seed=1, tie_word_embeddings=False
    )


@pytest.fixture
def engine(model: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**flags: Any) -> Engine:
        made.append(
            Engine(model, **({"max_model_len": 256, "num_gpu_blocks_override": 200} | flags))
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def _solo(make: Callable[..., Engine], prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """Each prompt alone, whole, without cache or overlap: the reference."""
    engine = make(enable_prefix_caching=False, async_scheduling=False, max_num_batched_tokens=256)
    return [engine.generate([prompt], **params)[0] for prompt in prompts]


def _smallest_pool(make: Callable[..., Engine], max_model_len: int) -> int:
    """Blocks, the padding block included, that one request of that length needs."""
    with pytest.raises(ConfigError) as caught:
        make(num_gpu_blocks_override=1, max_model_len=max_model_len)
    needed = re.search(r"needs (\d+) KV blocks", str(caught.value))
    assert needed is not None
    return int(needed[1])


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "frequency_penalty": 0.3}


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batched_equals_solo(engine: Callable[..., Engine], params: dict[str, Any]) -> None:
    prompts = [_prompt(n) for n in (3, 17, 40, 71, 5)]
    batched = engine(max_num_batched_tokens=256)
    assert batched.generate(prompts, **params) == _solo(engine, prompts, **params)
    assert batched.core.stats().num_steps < 16 * len(prompts)


def test_chunked_equals_whole(engine: Callable[..., Engine]) -> None:
    prompts = [_prompt(n) for n in (90, 61)]
    chunked = engine(max_num_batched_tokens=24, max_num_seqs=4)
    assert chunked.generate(prompts) == _solo(engine, prompts)
    assert chunked.core.stats().num_chunked_prefills == 2


def test_cached_equals_cold(engine: Callable[..., Engine]) -> None:
    head = _prompt(70)
    prompts = [head + _prompt(9), head + _prompt(13), list(head)]
    warm = engine()
    first = warm.generate([prompts[0]])
    rest = warm.generate(prompts[1:])
    assert first + rest == _solo(engine, prompts)
    assert [warm.results[i].num_cached_tokens for i in (0, 1, 2)] == [0, 64, 64]


def test_salt_keeps_caches_apart(engine: Callable[..., Engine]) -> None:
    prompt = _prompt(50)
    warm = engine()
    for salt in ("a", "b", "a"):
        warm.add(prompt, cache_salt=salt)
        warm.run()
    assert [warm.results[i].num_cached_tokens for i in range(3)] == [0, 0, 48]


def test_preempted_equals_undisturbed(engine: Callable[..., Engine]) -> None:
    prompts = [_prompt(n) for n in (40, 44, 47, 50)]
    params = SAMPLED | {"max_tokens": 60, "temperature": 1.8, "frequency_penalty": 2.0}
    tight = engine(num_gpu_blocks_override=_smallest_pool(engine, 112) + 8, max_model_len=112)
    assert tight.generate(prompts, **params) == _solo(engine, prompts, **params)
    assert tight.core.stats().num_preemptions > 0


def test_overlapped_equals_synchronous(engine: Callable[..., Engine]) -> None:
    prompts = [_prompt(n) for n in (8, 33)]
    overlapped, synchronous = engine(), engine(async_scheduling=False)
    assert overlapped.generate(prompts) == synchronous.generate(prompts)
    assert overlapped.core.stats().max_in_flight == 2
    assert synchronous.core.stats().max_in_flight == 1


def test_an_abort_beside_it_changes_nothing(engine: Callable[..., Engine]) -> None:
    prompts = [_prompt(n) for n in (20, 35)]
    reference = _solo(engine, prompts, max_tokens=24)
    disturbed = engine()
    ids = [disturbed.add(prompt, max_tokens=24) for prompt in prompts]
    victims = [disturbed.add(_prompt(45), max_tokens=50) for _ in range(3)]
    for number, victim in enumerate(victims):
        for _ in range(number * 4):
            disturbed.step()
        disturbed.abort(victim)
    results = disturbed.run()
    assert [results[i].token_ids for i in ids] == reference
    assert disturbed.core.stats().num_late_results > 0


def test_priority_goes_first(engine: Callable[..., Engine]) -> None:
    ordered = engine(scheduling_policy="priority", max_num_seqs=1, async_scheduling=False)
    late = ordered.add(_prompt(20), priority=5)
    urgent = ordered.add(_prompt(20), priority=-5)
    while ordered.results[urgent].finish_reason is None:
        ordered.step()
    assert ordered.results[late].finish_reason is None
    ordered.run()


def test_whole_prompts_where_chunking_is_off(engine: Callable[..., Engine]) -> None:
    prompts = [_prompt(n) for n in (90, 61)]
    whole = engine(enable_chunked_prefill=False, max_num_batched_tokens=256)
    assert whole.generate(prompts) == _solo(engine, prompts)
    assert whole.core.stats().num_chunked_prefills == 0


# One planted bug for each oracle above: the oracle must notice it.
# A bug is given `patch` and plants itself.
Patch = pytest.MonkeyPatch


def _on_build(patch: Patch, spoil: Callable[[SchedulerOutput, StepInputs], None]) -> None:
    build = InputBatcher.build

    def spoiled(self: InputBatcher, plan: SchedulerOutput, *rest: Any) -> StepInputs:
        inputs = build(self, plan, *rest)
        spoil(plan, inputs)
        return inputs

    patch.setattr(InputBatcher, "build", spoiled)


def _rows_read_their_neighbours_blocks(patch: Patch) -> None:
    def spoil(plan: SchedulerOutput, inputs: StepInputs) -> None:
        for metadata in inputs.metadata:
            metadata.block_table = metadata.block_table.roll(1, 0)

    _on_build(patch, spoil)


def _chunks_forget_what_came_before(patch: Patch) -> None:
    def spoil(plan: SchedulerOutput, inputs: StepInputs) -> None:
        for metadata in inputs.metadata:
            rows = range(metadata.num_decode_rows, metadata.num_rows)
            for row in rows:
                metadata.seq_lens_cpu[row] = metadata.query_lens_cpu[row]

    _on_build(patch, spoil)


def _hashes_leave_out_the_tokens(patch: Patch) -> None:
    for module in (prefix_hash, scheduler):
        patch.setattr(module, "block_hash", lambda parent, tokens: digest(b"planted", parent))


def _salts_are_ignored(patch: Patch) -> None:
    root = digest(b"planted")
    patch.setattr(prefix_hash, "root_hash", lambda salt: root)


def _resumed_output_counts_as_prompt(patch: Patch) -> None:
    """So their draws count from zero again."""
    add = RequestSlots.add

    def spoiled(self: RequestSlots, request: NewRequest) -> None:
        add(self, msgspec.structs.replace(request, num_prompt_tokens=len(request.token_ids)))

    patch.setattr(RequestSlots, "add", spoiled)


def _newest_step_is_committed_first(patch: Patch) -> None:
    class Stack(deque[Any]):
        def popleft(self) -> Any:
            return self.pop()

    patch.setattr(core, "deque", Stack)


def _aborted_requests_keep_their_blocks(patch: Patch) -> None:
    finish = Scheduler.abort

    def spoiled(self: Scheduler, client: int, wire_id: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(KVCacheManager, "release", lambda self, slot: None)
            finish(self, client, wire_id)

    patch.setattr(Scheduler, "abort", spoiled)


def _priorities_are_turned_round(patch: Patch) -> None:
    add = Scheduler.add
    patch.setattr(
        Scheduler,
        "add",
        lambda self, m: add(self, msgspec.structs.replace(m, priority=-m.priority)),
    )


def _prompts_are_cut_all_the_same(patch: Patch) -> None:
    patch.setattr(Scheduler, "_trim", lambda self, start, todo, budget, rows: min(todo, budget, 16))


PLANTED: list[tuple[Callable[..., None], dict[str, Any], Callable[[Patch], None]]] = [
    (test_batched_equals_solo, {"params": {}}, _rows_read_their_neighbours_blocks),
    (test_batched_equals_solo, {"params": SAMPLED}, _rows_read_their_neighbours_blocks),
    (test_chunked_equals_whole, {}, _chunks_forget_what_came_before),
    (test_cached_equals_cold, {}, _hashes_leave_out_the_tokens),
    (test_salt_keeps_caches_apart, {}, _salts_are_ignored),
    (test_preempted_equals_undisturbed, {}, _resumed_output_counts_as_prompt),
    (test_overlapped_equals_synchronous, {}, _newest_step_is_committed_first),
    (test_an_abort_beside_it_changes_nothing, {}, _aborted_requests_keep_their_blocks),
    (test_priority_goes_first, {}, _priorities_are_turned_round),
    (test_whole_prompts_where_chunking_is_off, {}, _prompts_are_cut_all_the_same),
]


@pytest.mark.parametrize(
    ("oracle", "arguments", "plant"), PLANTED, ids=[plant.__name__[1:] for *_, plant in PLANTED]
)
def test_a_planted_bug_is_noticed(
    engine: Callable[..., Engine],
    monkeypatch: Patch,
    oracle: Callable[..., None],
    arguments: dict[str, Any],
    plant: Callable[[Patch], None],
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, LookupError, ValueError, RuntimeError)):
        oracle(engine, **arguments)
