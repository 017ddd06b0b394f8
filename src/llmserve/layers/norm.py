# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""RMSNorm."""

import torch
from torch import nn

from llmserve.kernels.rms_norm import rms_norm
from llmserve.layers.base import Build, Layer
from llmserve.quantization.base import NormSpec


class RMSNorm(Layer):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), in float32 inside.

    With an `offset` (Gemma's 1 + w) the weight is kept in float32: 1 + w has too few bits in
    bfloat16. `spec` is there once finalized.
    """

    weight: nn.Parameter

    def __init__(self, build: Build, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.eps = eps
        dtype = torch.float32 if offset else build.dtype
        self.new_parameter("weight", torch.empty(size, dtype=dtype, device=build.device))

    def finalize(self) -> None:
        weight = self.weight.data + self.offset if self.offset else self.weight.data
        self.spec = NormSpec(weight, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape and dtype."""
        return rms_norm(x, self.spec.weight, self.eps)
