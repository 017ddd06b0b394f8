# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Linear layers: one LinearMethod, and whatever it does not fuse composed around it."""

import torch

from llmserve.kernels.rms_norm import rms_norm
from llmserve.kernels.silu_mul import gated_act
from llmserve.layers.base import Build, Layer
from llmserve.quantization.base import LinearMethod, NormSpec


class Linear(Layer):
    """[num_tokens, in_features] -> [num_tokens, sum(output_sizes)].

    Several `output_sizes` are several checkpoint tensors stacked by rows (q, k, v; gate, up); the
    loader finds them through the model's PACKED map.
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        output_sizes: tuple[int, ...],
        bias: bool = False,
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        self.output_sizes = output_sizes
        self.method = method or build.linear()
        created = self.method.create(
            in_features, sum(output_sizes), bias, build.dtype, build.device
        )
        for name, value in created.items():
            self.new_parameter(name, value)

    def finalize(self) -> None:
        params = {name: param.data for name, param in self.named_parameters()}
        self._parameters.clear()  # the method may keep them in another layout
        self.method.finalize(params)

    def forward(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) W^T + b) + residual; `act` is a gated activation of the output's halves, and
        `residual` may be overwritten."""
        fuses = self.method.fuses(x.shape[0], act is not None)
        if norm is not None and "norm" not in fuses:
            x, norm = rms_norm(x, norm.weight, norm.eps), None
        act_inside = act if "act" in fuses else None
        residual_inside = residual if "residual" in fuses and act_inside == act else None
        x = self.method.apply(x, norm, act_inside, residual_inside)
        if act is not None and act_inside is None:
            x = gated_act(x, act)
        if residual is not None and residual_inside is None:
            x = x + residual
        return x
