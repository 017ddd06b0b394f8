# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The gated MLP."""

import torch

from llmserve.layers.base import Block, Build
from llmserve.layers.linear import Linear
from llmserve.quantization.base import NormSpec


class GatedMLP(Block):
    """down(act(gate(x)) * up(x)). `activation` is "silu" or "gelu_tanh"."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up_proj = Linear(build, hidden_size, (intermediate_size, intermediate_size), bias)
        self.down_proj = Linear(build, intermediate_size, (hidden_size,), bias)

    def forward(
        self, x: torch.Tensor, norm: NormSpec, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[num_tokens, hidden] -> the same, `norm` applied first and `residual` added last."""
        inner = self.gate_up_proj(x, norm, self.activation)
        return self.down_proj(inner, residual=residual)
