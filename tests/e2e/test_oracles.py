# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The same request gives the same tokens, however it was scheduled.

A tiny random model in float32 on the CPU, through the real scheduler, cache and runner. Every test
asserts from counters that what it is about has happened.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.errors import ConfigError
from tests.helpers.engine import Engine
from tests.helpers.tiny_models import write_tiny_model

FAMILIES = ("llama", "gemma3")  # full attention alone, and the hybrid with a window
_RNG = np.random.default_rng()


def _prompt(length: int) -> list[int]:
    return _RNG.integers(5, 120, length).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp(request.param), request.param, seed=1)


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
    params = {"max_tokens": 60} | SAMPLED
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
