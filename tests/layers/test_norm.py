# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import torch

from llmserve.layers.base import Build
from llmserve.layers.norm import RMSNorm
from llmserve.quantization.unquantized import UnquantizedLinear


def test_offset_keeps_the_bits_that_bfloat16_would_lose() -> None:
    build = Build(torch.bfloat16, torch.device("cpu"), UnquantizedLinear, 1)
    norm = RMSNorm(build, 64, 1e-6, offset=1.0)
    weight = torch.randn(64) * 1e-3  # lost in 1 + w with 8 bits
    norm.weight.data.copy_(weight)
    norm.finalize()
    x = torch.randn(3, 2, 64, dtype=torch.bfloat16)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    assert torch.equal(norm.spec.weight, 1 + weight)
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=0)


def test_plain_norm_has_the_models_dtype_and_no_offset() -> None:
    build = Build(torch.bfloat16, torch.device("cpu"), UnquantizedLinear, 1)
    norm = RMSNorm(build, 8, 1e-6)
    norm.weight.data.fill_(3.0)
    norm.finalize()
    assert norm.spec.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        norm(torch.full((1, 8), 2.0, dtype=torch.bfloat16)), torch.full((1, 8), 3.0).bfloat16()
    )
