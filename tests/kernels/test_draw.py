# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""draw_rows in torch and in interpreted Triton against the definition in float64."""

import math

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.core.sampling_params import SamplingParams
from llmserve.kernels import draw as module
from llmserve.kernels.draw import draw_rows, draw_rows_torch
from llmserve.kernels.triton_jit import next_power_of_2
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted
from tests.helpers.sampling import reference_gumbel, reference_kept

torch.set_num_threads(1)


def _params(rows: list[tuple[float, float, int, float]], width: int) -> torch.Tensor:
    """Of (temperature, min_p, top_k, top_p), 0 = no top_k."""
    return torch.tensor(
        [[t, math.log(m) if m else -math.inf, k or width, p] for t, m, k, p in rows]
    )


def _random_params(rng: np.random.Generator, n: int) -> list[tuple[float, float, int, float]]:
    return [
        (
            float(rng.choice([0, 0.1, 0.7, 1, 1.9])),
            float(rng.choice([0, 0, 0.02, 0.3, 1])),
            int(rng.choice([0, 0, 1, 2, 40, 700])),
            float(rng.choice([1, 1e-9, 0.3, 0.9, 0.999])),
        )
        for _ in range(n)
    ]


def _logits(rng: np.random.Generator, n: int, width: int) -> torch.Tensor:
    scale = rng.choice([0, 0.01, 1, 6], (n, 1))
    x = torch.from_numpy(rng.normal(size=(n, width)) * scale + rng.choice([-20, 0, 9], (n, 1)))
    x = x.float()
    x[::3] = x[::3].bfloat16().float()  # ties, at the borders too
    x[1::4, rng.permutation(width)[: width * 4 // 5]] = -math.inf
    x[2::5, : width // 2] = -1e30
    return x


def _draw(
    logits: torch.Tensor, params: torch.Tensor, seeds: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Through slots in another order; both flags as the rows have them."""
    n, width = logits.shape
    slots = torch.randperm(n + 3)[:n]
    table, by_slot = torch.full((n + 3, 4), math.nan), torch.zeros(n + 3, dtype=torch.int64)
    table[slots], by_slot[slots] = params, seeds
    random = params[:, 0] > 0
    limited = (params[:, 1] > -math.inf) | (params[:, 2] < width) | (params[:, 3] < 1)
    arrived = torch.zeros(n + 1, dtype=torch.int32)
    token_ids, invalid, lowest = draw_rows(
        logits, slots, table, by_slot, index, arrived,
        random=bool(random.any()), truncated=bool((random & limited).any()),
    )  # fmt: skip
    assert not arrived.any()
    return token_ids, invalid, torch.full((n, 1), -math.inf) if lowest is None else lowest


def _seeds(rng: np.random.Generator, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    seeds = rng.integers(-(2**63), 2**63 - 1, n)
    return torch.from_numpy(seeds), torch.from_numpy(rng.integers(0, 5000, n))


@pytest.mark.parametrize(("n", "width"), [(1, 1), (3, 40), (40, 333), (17, 1025), (9, 5003)])
def test_equals_the_definition(n: int, width: int) -> None:
    rng = np.random.default_rng()
    logits, (seeds, index) = _logits(rng, n, width), _seeds(rng, n)
    rows = _random_params(rng, n)
    token_ids, invalid, lowest = _draw(logits, _params(rows, width), seeds, index)
    assert not invalid.any()
    for i, (temperature, min_p, top_k, top_p) in enumerate(rows):
        if temperature == 0:
            assert token_ids[i] == logits[i].argmax()
            continue
        x = (logits[i] / torch.tensor(temperature)).double().numpy()
        # With top_p as the table has it
        p = SamplingParams(
            max_tokens=None, min_p=min_p, top_k=top_k, top_p=float(np.float32(top_p))
        )
        kept = reference_kept(x, p)
        found = x >= max(float(lowest[i]), -3.4e38)
        # A mass that is top_p within rounding is either's
        assert (kept == found).all() or abs(_share(x, kept, found, p) - p.top_p) < 2e-6, rows[i]
        score = np.where(
            found, x + reference_gumbel(int(seeds[i]), int(index[i]), width), -math.inf
        )
        assert score[token_ids[i]] >= score.max() - 1e-5


def _share(x: np.ndarray, kept: np.ndarray, found: np.ndarray, p: SamplingParams) -> float:
    """Of the mass before top_p: that of the smaller set."""
    without = SamplingParams(max_tokens=None, min_p=p.min_p, top_k=p.top_k)
    mass = np.where(reference_kept(x, without), np.exp(x - x.max()), 0)
    return float(mass[kept & found].sum() / mass.sum())


def test_equals_the_reference_in_every_output() -> None:
    rng = np.random.default_rng()
    n, width = 24, 1500
    logits, (seeds, index) = _logits(rng, n, width), _seeds(rng, n)
    logits[::2] *= 1 + 1e-3 * torch.rand(1)
    params = _params(_random_params(rng, n), width)
    arguments = (torch.arange(n), params, seeds, index, torch.zeros(n, dtype=torch.int32))
    ours = draw_rows(logits, *arguments, random=True, truncated=True)
    reference = draw_rows_torch(logits, *arguments, random=True, truncated=True)
    differing = (ours[0] != reference[0]) | (ours[2] != reference[2])[:, 0]
    assert differing.sum() <= 1  # a border or two scores within the last bits of float32
    assert torch.equal(ours[1], reference[1])


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("truncated", [False, True])
def test_rows_without_a_finite_maximum_are_invalid_alone(random: bool, truncated: bool) -> None:
    rng = np.random.default_rng()
    n, width = 7, 2100
    logits, (seeds, index) = torch.randn(n, width), _seeds(rng, n)
    params = _params([(0.7 * random, 0.1 * truncated, 50 * truncated, 1.0)] * n, width)
    healthy = _draw(logits, params, seeds, index)[0]
    logits[0, 2099] = math.nan
    logits[2] = -math.inf
    logits[3, 64] = math.inf
    logits[5] = math.nan
    logits[6, : width - 1] = -math.inf
    token_ids, invalid, _ = _draw(logits, params, seeds, index)
    assert invalid.tolist() == [True, False, True, True, False, True, False]
    assert token_ids.tolist() == [0, healthy[1], 0, 0, healthy[4], 0, width - 1]


def test_equal_scores_go_to_the_lowest_id() -> None:
    width = 5000
    logits = torch.zeros(4, width)
    logits[0, [4999, 700, 64, 3000]] = 1
    logits[1, [4998, 4999]] = 1
    logits[3, 2047:2050] = 1
    token_ids, _, _ = _draw(
        logits, _params([(0.0, 0, 0, 1.0)] * 4, width), *_seeds(np.random.default_rng(), 4)
    )
    assert token_ids.tolist() == [64, 4998, 0, 2047]


def test_a_row_draws_the_same_in_any_batch() -> None:
    rng = np.random.default_rng()
    n, width = 19, 3001
    logits, (seeds, index) = _logits(rng, n, width), _seeds(rng, n)
    params = _params(_random_params(rng, n), width)
    whole = _draw(logits, params, seeds, index)
    for i in range(0, n, 4):
        rows = torch.tensor([i])
        alone = _draw(logits[rows], params[rows], seeds[rows], index[rows])
        assert [part.item() for part in alone] == [part[i].item() for part in whole]


def test_limits_keep_ties_together_and_the_token_that_crosses_the_border() -> None:
    width = 200
    logits = torch.full((5, width), -math.inf)
    logits[:, 90:94] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    rows = [(1.0, 0, 0, 0.7), (1.0, 0, 0, 0.76), (1.0, 0, 3, 1.0), (1.0, 0.4, 0, 1.0)]
    rows.append((1.0, 0.2, 2, 0.7))  # of 0.75 that top_k leaves, 0.5 is less than 0.7
    _, _, lowest = _draw(logits, _params(rows, width), *_seeds(np.random.default_rng(), 5))
    assert (logits >= lowest).sum(1).tolist() == [2, 4, 4, 2, 2]


def test_frequencies_equal_probabilities() -> None:
    # The interpreter is slow; there it is the definition that the tests above compare with
    n, width, steps = 100, 8, 1 if envs.TRITON_INTERPRET else 50
    raw = torch.linspace(2, -1, width)
    rows = [(0.8, 0.0, 6, 0.9), (1.3, 0.0, 0, 1.0)] * (n // 2)
    params = _params(rows, width)
    counts = np.zeros((2, width))
    for step in range(steps):
        token_ids, _, _ = _draw(raw.repeat(n, 1), params, torch.arange(n), torch.full((n,), step))
        for kind in range(2):
            counts[kind] += np.bincount(token_ids[kind::2].numpy(), minlength=width)
    for kind, (temperature, min_p, top_k, top_p) in enumerate(rows[:2]):
        x = raw.double().numpy() / temperature
        p = SamplingParams(max_tokens=None, min_p=min_p, top_k=top_k, top_p=top_p)
        mass = np.where(reference_kept(x, p), np.exp(x - x.max()), 0)
        expected = mass / mass.sum() * counts[kind].sum()
        assert counts[kind][expected == 0].sum() == 0
        kept = expected > 0
        chi2 = ((counts[kind] - expected)[kept] ** 2 / expected[kept]).sum()
        assert chi2 < kept.sum() - 1 + 5 * math.sqrt(2 * kept.sum())


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    _TYPES = {
        "logits": "*fp32", "slots": "*i64", "all_params": "*fp32", "seeds": "*i64",
        "output_index": "*i64", "values": "*fp32", "ids": "*i32", "arrived": "*i32",
        "token_ids": "*i64", "invalid": "*i1", "lowest": "*fp32", "width": "i32",
    }  # fmt: skip
    _SIZES = {"BLOCK": module._BLOCK, "TILE_BLOCKS": module._TILE_BLOCKS}

    @pytest.mark.parametrize("random", [False, True])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_scan_compiles(arch: int, random: bool) -> None:
        compile_for(
            arch, module._scan_kernel, _TYPES, **_SIZES, RANDOM=random, TRUNCATED=random,
            MAX_SPLITS=module._MAX_SPLITS,
        )  # fmt: skip

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_truncate_compiles(arch: int) -> None:
        blocks = next_power_of_2(262_144 // module._BLOCK)
        compile_for(
            arch, module._truncate_kernel, _TYPES, 8, **_SIZES, ALL_BLOCKS=blocks,
            WAYS=module._WAYS,
        )  # fmt: skip
