# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gated_act against float64, in torch and in interpreted Triton; compiled for both targets."""

import math

import pytest
import torch

from llmserve import envs
from llmserve.kernels import silu_mul as module
from llmserve.kernels.silu_mul import gated_act
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1536), (5, 2100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if envs.TRITON_INTERPRET and dtype == torch.bfloat16:
        return  # the interpreter's bfloat16 is not to be trusted
    x = (3 * torch.randn(shape)).to(dtype)
    gate, up = x.double().chunk(2, -1)
    if kind == "silu":
        act = gate / (1 + torch.exp(-gate))
    else:
        act = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        gated_act(x, kind).double(), act * up, atol=tolerance, rtol=tolerance
    )


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("gelu", [False, True])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int, gelu: bool) -> None:
        types = {"x": "*bf16", "out": "*bf16", "intermediate": "i32"}
        compile_for(arch, module._gated_act_kernel, types, GELU=gelu, BLOCK=1024, PDL=True)
