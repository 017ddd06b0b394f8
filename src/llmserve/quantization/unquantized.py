# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights in the model's own dtype."""

import torch
import torch.nn.functional as F

from llmserve.kernels.fused_linear import fused_linear, scratch_of, tile_for
from llmserve.kernels.rms_norm import rms_norm
from llmserve.kernels.silu_mul import gated_act
from llmserve.quantization.base import LinearMethod, NormSpec


class UnquantizedLinear(LinearMethod):
    """x W^T + b. On a CPU the weight is kept in oneDNN's blocked layout where that is faster.

    Demo model, 2 cores with AMX, speed over F.linear at 1 / 8 rows. bfloat16: 1.5 / 1.6, always
    reordered. float32: gate_up 0.9 / 1.7, lm_head 1.0 / 2.6, but qkv 0.8 / 1.2, o 0.7 / 1.05, down
    0.7 / 1.03, all slower in prefill: only wide ones are.

    On CUDA all that stands around a product is done here: inside one kernel for few tokens, else by
    kernels of their own, but for the residual, which the product adds in place.
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
        out_features, in_features = self.weight.shape
        wide = out_features >= 4 * in_features
        if self.weight.is_cuda:
            self.fuses = frozenset({"norm", "act", "residual"})
        self.reordered = (wide or self.weight.dtype != torch.float32) and _can_reorder(self.weight)
        if self.reordered:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.linear = torch.ops.mkldnn._linear_pointwise.default

    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.reordered:
            return self.linear(x, self.weight, self.bias, "none", [], "")
        if not self.fuses:
            return F.linear(x, self.weight, self.bias)
        weight, bias = self.weight, self.bias
        if x.dtype != torch.float32:
            out_features = weight.shape[0] // (2 if act else 1)
            tile = tile_for(len(x), out_features, weight.shape[1], act is not None, x.device)
            if tile is not None:
                spec = None if norm is None else (norm.weight, norm.eps)
                scratch = scratch_of(x.device)
                return fused_linear(x, weight, bias, spec, act, residual, tile, scratch)
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        if residual is not None and act is None and bias is None:
            return residual.addmm_(x, weight.t())
        x = F.linear(x, weight, bias)
        if act is not None:
            x = gated_act(x, act)
        return x if residual is None else x + residual


def _can_reorder(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
