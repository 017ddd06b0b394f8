# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import torch
from torch import nn

from llmserve.layers.base import Build, Layer
from llmserve.layers.norm import RMSNorm
from llmserve.model_loader.dummy import fill_dummy
from llmserve.quantization.unquantized import UnquantizedLinear

BUILD = Build(torch.bfloat16, torch.device("cpu"), UnquantizedLinear, 1)


class Typed(Layer):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.new_parameter("weight", torch.empty(40, 50, dtype=dtype))


def filled(dtype: torch.dtype) -> tuple[Any, Any]:
    net = nn.ModuleList([Typed(dtype), Typed(dtype)])
    fill_dummy(net)
    return net[0].weight.data, net[1].weight.data


def test_uniform_within_the_bound_different_by_name_equal_by_run() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first, second = filled(dtype)
        assert first.abs().max() <= 1e-3 and first.float().std() > 5e-4
        assert abs(first.float().mean()) < 1e-4
        assert not torch.equal(first, second)
        assert torch.equal(first, filled(dtype)[0])


def test_few_bit_types_are_not_all_zero() -> None:
    values, _ = filled(torch.float8_e4m3fn)
    assert values.float().abs().max() > 0.25


def test_norms_multiply_by_one() -> None:
    norms = [RMSNorm(BUILD, 8, 1e-6), RMSNorm(BUILD, 8, 1e-6, offset=1.0)]
    fill_dummy(nn.ModuleList(norms))
    for norm in norms:
        norm.finalize()
        assert torch.equal(norm.spec.weight.float(), torch.ones(8))
