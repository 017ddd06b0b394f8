# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights in the model's own dtype."""

import torch
import torch.nn.functional as F

from llmserve.quantization.base import LinearMethod, NormSpec


class UnquantizedLinear(LinearMethod):
    """x W^T + b. On a CPU the weight is kept in oneDNN's blocked layout, where there is oneDNN.

    Layers of the demo model on 2 cores with AMX, reordered against F.linear: bfloat16 1.5 x at 1
    and 8 rows; float32 0.8 x at 1 row, 1.5 x at 8 (lm_head 1.0 x and 2.3 x).
    """

    def create(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        params = {"weight": torch.empty(out_features, in_features, dtype=dtype, device=device)}
        if bias:
            params["bias"] = torch.empty(out_features, dtype=dtype, device=device)
        return params

    def finalize(self, params: dict[str, torch.Tensor]) -> None:
        self.weight = params["weight"]
        self.bias = params.get("bias")
        self.reordered = _can_reorder(self.weight)
        if self.reordered:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.reordered:
            return torch.ops.mkldnn._linear_pointwise.default(
                x, self.weight, self.bias, "none", [], ""
            )
        return F.linear(x, self.weight, self.bias)


def _can_reorder(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
