# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math

import numpy as np
import pytest
import torch

from llmserve.sampling.base import SamplerContext
from llmserve.sampling.truncation import Limits, Truncation, prefix_lowest, wide_lowest
from tests.helpers.sampling import new_request, reference_kept

WIDTH = 200


def _random_params(rng: np.random.Generator) -> dict[str, float]:
    params = {
        "min_p": float(rng.choice([0.01, 0.1, 1.0])),
        "top_k": int(rng.choice([1, 3, 20, 150])),
        "top_p": float(rng.choice([1e-6, 0.3, 0.9, 0.999])),
    }
    return {name: value for name, value in params.items() if rng.random() < 0.6}


def _limits(all_params: list[dict[str, float]]) -> Limits:
    truncation = Truncation(SamplerContext(len(all_params) + 1, WIDTH, torch.device("cpu"), []))
    for slot, params in enumerate(all_params, 1):
        truncation.add(slot, new_request(slot, [0], **params))
        assert truncation.active[slot] == bool(params)
    return truncation.limits(np.arange(1, len(all_params) + 1))


def _rows(rng: np.random.Generator, n: int) -> torch.Tensor:
    x = torch.from_numpy(rng.normal(size=(n, WIDTH)) * rng.choice([0.5, 2, 6], (n, 1))).float()
    x[::3] = x[::3].bfloat16().float()  # ties, also at the borders
    x[1::4, :150] = -math.inf
    return x


def _kept(x: torch.Tensor, all_params: list[dict[str, float]]) -> np.ndarray:
    pairs = zip(x.double().numpy(), all_params, strict=True)
    return np.array([reference_kept(row, new_request(1, [0], **p).params) for row, p in pairs])


def test_wide_keeps_what_the_definition_says() -> None:
    rng = np.random.default_rng()
    params = [_random_params(rng) for _ in range(60)]
    x = _rows(rng, 60)
    kept = (x >= wide_lowest(x, _limits(params))).numpy()
    np.testing.assert_array_equal(kept, _kept(x, params))


@pytest.mark.parametrize("size", [8, 64, 199, WIDTH])
def test_a_sure_prefix_equals_the_definition(size: int) -> None:
    rng = np.random.default_rng()
    params = [_random_params(rng) | {"top_p": 0.9} for _ in range(90)]
    x = _rows(rng, 90)
    total = (x - x.amax(1, keepdim=True)).double().exp().sum(1, keepdim=True)
    lowest, sure = prefix_lowest(x.topk(size).values, total, _limits(params), whole=size == WIDTH)
    kept, expected = (x >= lowest).numpy(), _kept(x, params)
    np.testing.assert_array_equal(kept[sure], expected[sure])
    # It is sure of all that it can know: the kept tokens and one more lie in the prefix, and with
    # another limit beside top_p, so do that limit's own and one more
    alone = [{k: v for k, v in p.items() if k != "top_p"} for p in params]
    needed = np.where([bool(p) for p in alone], _kept(x, alone).sum(1), expected.sum(1))
    np.testing.assert_array_equal(sure.numpy(), (needed < size) | (size == WIDTH))


def test_the_token_that_crosses_the_border_is_kept_and_ties_stay_together() -> None:
    x = torch.full((4, WIDTH), -math.inf)
    x[:, :4] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    params = [{"top_p": 0.7}, {"top_p": 0.76}, {"top_k": 3}, {"min_p": 0.4}]
    assert (x >= wide_lowest(x, _limits(params))).sum(1).tolist() == [2, 4, 4, 2]
    alone = [x[:1] >= wide_lowest(x[:1], _limits([p])) for p in params]
    assert [kept.sum().item() for kept in alone] == [2, 4, 4, 2]
