# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""rms_norm against float64, in torch and in interpreted Triton; compiled for both targets."""

import pytest
import torch

from llmserve import envs
from llmserve.kernels import rms_norm as module
from llmserve.kernels.rms_norm import rms_norm
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (130, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wide = torch.randn(shape[0], 3, *shape[1:]).to(dtype)
    x = wide[:, 1]  # strided, as a slice of a projection is
    weight = torch.randn(shape[-1])
    if dtype != torch.float16:
        weight = weight.to(dtype)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    expected *= weight.double()
    out = rms_norm(x, weight, 1e-3)
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_empty() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "hidden": "i32", "eps": "fp32"}
        compile_for(arch, module._rms_norm_kernel, types, BLOCK=4096, PDL=True)
