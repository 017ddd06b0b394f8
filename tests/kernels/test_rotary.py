# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""apply_rotary against complex multiplication; torch and interpreted Triton; compiled."""

import pytest
import torch

from llmserve import envs
from llmserve.kernels import rotary as module
from llmserve.kernels.rotary import apply_rotary
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)


def _expected(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = angles.shape[1]
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rot_dim"), [(64, 64), (80, 80), (64, 24)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_equals_complex(num_tokens: int, dim: int, rot_dim: int, dtype: torch.dtype) -> None:
    if envs.TRITON_INTERPRET and dtype == torch.bfloat16:
        return  # the interpreter's bfloat16 is not to be trusted
    qkv = torch.randn(num_tokens, 5 + 2 * 2, dim).to(dtype)
    query, key = qkv[:, :5], qkv[:, 5:7]
    table = torch.rand(50, rot_dim // 2, dtype=torch.float64) * 6
    positions = torch.randint(50, (num_tokens,))
    angles = table[positions]
    expected = _expected(query, angles), _expected(key, angles)
    cache = torch.cat((table.cos(), table.sin()), -1).float()
    untouched = qkv[:, 7:].clone()
    out = apply_rotary(query, key, positions, cache)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    assert torch.equal(qkv[:, 7:], untouched)


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        types = {"query": "*bf16", "key": "*bf16", "positions": "*i64", "cos_sin_cache": "*fp32"}
        types |= {"num_heads": "i32", "half": "i32"}
        compile_for(arch, module._rotary_kernel, types, warps=1, BLOCK=64)
