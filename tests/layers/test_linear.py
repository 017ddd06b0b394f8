# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Composition around a LinearMethod: the same result whatever the method fuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from llmserve.layers.base import Build
from llmserve.layers.linear import Linear
from llmserve.quantization.base import LinearMethod, NormSpec
from llmserve.quantization.unquantized import UnquantizedLinear

CPU = torch.device("cpu")


class Fusing(LinearMethod):
    """Does what it is told to in plain torch, and refuses the rest."""

    def __init__(self, fused: frozenset[str]) -> None:
        self.fused = fused
        self.seen: set[str] = set()

    def fuses(self, num_tokens: int, act: bool) -> frozenset[str]:
        return self.fused

    def create(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        return UnquantizedLinear().create(in_features, out_features, bias, dtype, device)

    def finalize(self, params: dict[str, torch.Tensor]) -> None:
        self.params = params

    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        asked = {"norm": norm, "act": act, "residual": residual}
        self.seen = {name for name, value in asked.items() if value is not None}
        assert self.seen <= self.fused
        if norm is not None:
            x = F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        x = F.linear(x, self.params["weight"], self.params["bias"])
        if act is not None:
            gate, up = x.chunk(2, -1)
            x = F.silu(gate) * up
        return x if residual is None else x + residual


SUBSETS = [
    frozenset(chosen)
    for count in range(4)
    for chosen in itertools.combinations(("norm", "act", "residual"), count)
]


@pytest.mark.parametrize("fuses", SUBSETS, ids=lambda fuses: "+".join(sorted(fuses)))
def test_every_split_between_method_and_layer_agrees(fuses: frozenset[str]) -> None:
    method = Fusing(fuses)
    layer = Linear(Build(torch.float32, CPU, UnquantizedLinear, 1), 16, (24, 24), True, method)
    for param in layer.parameters():
        param.data.normal_()
    weight, bias = layer.weight.data.double(), layer.bias.data.double()
    layer.finalize()
    x, residual, scale = torch.randn(5, 16), torch.randn(5, 24), torch.randn(16)
    ours = layer(x, NormSpec(scale, 1e-3), "silu", residual)
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * scale.double()
    gate, up = (normed @ weight.T + bias).chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up + residual.double()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    # An epilogue cannot add the residual before an activation that comes later.
    assert method.seen == fuses - ({"residual"} if "act" not in fuses else set())


def test_finalize_leaves_no_second_copy() -> None:
    layer = Linear(Build(torch.float32, CPU, UnquantizedLinear, 1), 8, (8,))
    layer.weight.data.normal_()
    layer.finalize()
    assert list(layer.parameters()) == []
