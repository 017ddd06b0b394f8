# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""top_logprobs against float64, in torch and in interpreted Triton; compiled for both targets."""

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.kernels import top_logprobs as module
from llmserve.kernels.top_logprobs import top_logprobs
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


def check(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> None:
    """Within 2e-5 of float64; ties in any order, -inf after all others."""
    ids, values, ranks = (part.cpu() for part in top_logprobs(logits, tokens, k))
    logits, tokens = logits.cpu(), tokens.cpu()
    exact = logits.double().log_softmax(1)
    assert torch.equal(ids[:, 0], tokens)
    own = logits.gather(1, tokens[:, None])
    assert torch.equal(ranks, 1 + (logits > own).sum(1))
    torch.testing.assert_close(values.double(), exact.gather(1, ids), rtol=0, atol=2e-5)
    likeliest = logits.sort(1, descending=True).values[:, :k]
    assert torch.equal(logits.gather(1, ids[:, 1:]), likeliest)
    assert all(len(set(row.tolist())) == k for row in ids[:, 1:])


@pytest.mark.parametrize(
    ("m", "width", "k"), [(0, 9, 2), (1, 5, 5), (2, 64, 0), (3, 4097, 6), (2, 9000, 3), (1, 90, 80)]
)
def test_equals_float64(m: int, width: int, k: int) -> None:
    logits = (torch.randn(m, width + 3) * 3)[:, :width]
    tokens = torch.from_numpy(np.random.default_rng().integers(0, width, m))
    check(logits, tokens, k)


def test_ties_and_what_is_forbidden() -> None:
    logits = torch.randint(0, 3, (4, 300)).float()
    logits[1] = -torch.inf
    logits[1, [7, 250]] = 1.0
    logits[2] = 0.5
    check(logits, torch.tensor([5, 7, 299, 0]), 6)


def test_nan_stays_in_its_row() -> None:
    logits = torch.randn(2, 200)
    logits[0, ::2] = torch.nan
    ids, values, _ = top_logprobs(logits, torch.tensor([0, 3]), 4)
    assert bool(((ids >= 0) & (ids < 200)).all()) and bool(values[1].isfinite().all())


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        pointers = {"logits": "*fp32", "token_ids": "*i64", "blocks": "*fp32", "likelier": "*i32"}
        numbers = {"stride": "i32", "width": "i32"}
        compile_for(
            arch, module._scan_kernel, pointers | numbers, warps=4, BLOCK=64, TILE_BLOCKS=64
        )
        out = {"ids": "*i64", "values": "*fp32", "ranks": "*i64"}
        compile_for(
            arch, module._select_kernel, pointers | out | numbers | {"k": "i32"}, warps=8,
            BLOCK=64, ALL_BLOCKS=4096, PROGRAMS=64, TILE_BLOCKS=64,
        )  # fmt: skip

    @pytest.mark.gpu
    @pytest.mark.parametrize("k", [0, 5, 20])
    def test_gpu_equals_float64(k: int) -> None:
        logits = torch.randn(33, 151_936, device="cuda") * 4
        logits[3, 100:] = -torch.inf
        check(logits, torch.randint(0, 100, (33,), device="cuda"), k)
