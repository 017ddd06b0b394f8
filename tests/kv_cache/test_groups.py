# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grouping of layers against trying everything."""

import itertools
import random

import pytest

from llmserve.core.kv_spec import (
    AnyKVSpec,
    FullAttentionSpec,
    MLASpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
)
from llmserve.errors import ConfigError
from llmserve.kv_cache.groups import (
    blocks_at_peak,
    make_kv_cache_config,
    page_bytes,
    plan_groups,
    tokens_that_fit,
)

FULL = FullAttentionSpec(2, 64, 2)
WINDOW = SlidingWindowSpec(2, 64, 2, window=512)
KINDS: list[AnyKVSpec] = [
    FULL, WINDOW, SlidingWindowSpec(4, 64, 2, window=100), MLASpec(512, 64, 2),
    RecurrentStateSpec(70_000),
]  # fmt: skip


def _partitions(layers: list[int]) -> list[list[list[int]]]:
    if not layers:
        return [[]]
    first, rest = layers[0], layers[1:]
    return [
        [[first, *picked], *others]
        for n in range(len(rest) + 1)
        for picked in itertools.combinations(rest, n)
        for others in _partitions([x for x in rest if x not in picked])
    ]


def _best_cost(specs: list[AnyKVSpec]) -> int:
    """Fewest padding layers plus groups over all ways to cut the layers into groups."""
    by_spec = [[i for i, s in enumerate(specs) if s == spec] for spec in set(specs)]
    best = 10**9
    for cut in itertools.product(*map(_partitions, by_spec)):
        groups = [group for part in cut for group in part]
        largest = max(map(len, groups))
        best = min(best, len(groups) + sum(largest - len(group) for group in groups))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    kinds = rng.sample(KINDS, rng.randint(1, 3))
    specs = [rng.choice(kinds) for _ in range(rng.randint(1, 7))]
    groups = plan_groups(specs, 16)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(specs)))
    assert all(specs[layer] == group.spec for group in groups for layer in group.layers)
    largest = max(len(group.layers) for group in groups)
    cost = len(groups) + sum(largest - len(group.layers) for group in groups)
    assert cost == _best_cost(specs)
    page = page_bytes(specs, 16)
    for group in groups:
        assert group.block_size % 16 == 0
        assert group.spec.page_bytes(group.block_size) <= page
        if not isinstance(group.spec, RecurrentStateSpec):
            assert group.spec.page_bytes(group.block_size + 16) > page


def test_gemma3_one_to_five() -> None:
    specs = [FULL if i % 6 == 5 else WINDOW for i in range(26)]
    groups = plan_groups(specs, 16)
    assert [len(group.layers) for group in groups] == [4] * 5 + [2] + [4]
    assert {group.block_size for group in groups} == {16}


def test_smaller_pages_take_more_tokens() -> None:
    groups = plan_groups([FULL, FullAttentionSpec(4, 64, 2)], 16)
    assert [group.block_size for group in groups] == [32, 16]


def test_config_and_what_fits() -> None:
    page = FULL.page_bytes(16)
    config = make_kv_cache_config(
        [FULL, WINDOW], 16, 200 * page + 5, max_model_len=1024, max_num_batched_tokens=64
    )
    assert (config.num_blocks, config.page_bytes, config.num_layers_per_group) == (200, page, 1)
    assert config.total_bytes <= 200 * page + 5
    # 64 blocks of full attention and 33 of the window for each request of 1,024 tokens
    assert tokens_that_fit(config, 1024) == 199 * 1024 // 97


def test_errors_name_the_numbers() -> None:
    page = FULL.page_bytes(16)
    with pytest.raises(ConfigError, match=r"1024 tokens needs 65 KV blocks, but 64 blocks fit"):
        make_kv_cache_config([FULL], 16, 64 * page, max_model_len=1024)
    make_kv_cache_config([FULL], 16, 65 * page, max_model_len=1024)
    with pytest.raises(ConfigError, match=r"needs 2 KV blocks, but 0 blocks fit in 0.00 GiB"):
        make_kv_cache_config([FULL], 16, -5)
    with pytest.raises(ConfigError, match=r"--num-gpu-blocks-override 66 needs more"):
        make_kv_cache_config([FULL], 16, 65 * page, 66)
    with pytest.raises(ConfigError, match=r"override allows 10"):
        make_kv_cache_config([FULL], 16, 65 * page, 10, max_model_len=1024)


@pytest.mark.parametrize("spec", [FULL, WINDOW, SlidingWindowSpec(2, 64, 2, window=1)])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_peak_is_what_a_request_needs(spec: AnyKVSpec, chunk: int) -> None:
    """Against walking through a request chunk by chunk, from any offset."""
    (group,) = plan_groups([spec], 16)
    for length in (1, 16, 17, 600, 1500):
        worst = 0
        window = spec.window if isinstance(spec, SlidingWindowSpec) else length
        for start in range(length):
            first = max(start - window + 1, 0)
            last = min(start + chunk, length) - 1
            worst = max(worst, last // 16 - first // 16 + 1)
        assert worst <= blocks_at_peak(group, length, chunk) <= worst + 1
