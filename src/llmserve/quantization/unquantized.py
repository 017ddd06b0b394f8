# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights in the model's own dtype."""

import torch
import torch.nn.functional as F

from llmserve.kernels import cpu
from llmserve.kernels.fused_linear import Tile, fused_linear, scratch_of, tile_for
from llmserve.kernels.triton_jit import on_gpu
from llmserve.quantization.base import LinearMethod, NormSpec

_NOTHING: frozenset[str] = frozenset()
_RESIDUAL = frozenset({"residual"})
_ALL = frozenset({"norm", "act", "residual"})
_ALL_BUT_NORM = _ALL - {"norm"}  # which scales by a row's factor last: float16 overflows before
_FEW, _MANY = 32, 192  # tokens up to which the compiled product is faster than torch's


class UnquantizedLinear(LinearMethod):
    """x W^T + b. On a CPU the compiled product of kernels/cpu.py multiplies few tokens, with all
    that stands around it, and torch's many.

    Where there is none, the weight is kept in oneDNN's blocked layout if that is faster. Demo
    model, 2 cores with AMX, speed over F.linear at 1 / 8 rows. bfloat16: 1.5 / 1.6, always
    reordered. float32: gate_up 0.9 / 1.7, lm_head 1.0 / 2.6, but qkv 0.8 / 1.2, o 0.7 / 1.05, down
    0.7 / 1.03, all slower in prefill: only wide ones are.

    On CUDA all that stands around a product of few tokens is done inside its kernel; else the
    product adds the residual in place.
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
        self.product = cpu.product_of(self.weight, self.bias)
        if self.product is not None:
            self.most = _FEW if self.weight.dtype == torch.float32 else _MANY
            self.reordered = False
            return
        out_features, in_features = self.weight.shape
        wide = out_features >= 4 * in_features
        self.reordered = (wide or self.weight.dtype != torch.float32) and _can_reorder(self.weight)
        if self.reordered:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.linear = torch.ops.mkldnn._linear_pointwise.default

    def _tile(self, num_tokens: int, act: bool) -> Tile | None:
        weight = self.weight
        if not on_gpu(weight) or weight.dtype == torch.float32:
            return None
        out_features, in_features = weight.shape
        return tile_for(num_tokens, out_features // (1 + act), in_features, act, weight.device)

    def fuses(self, num_tokens: int, act: bool) -> frozenset[str]:
        if not on_gpu(self.weight):
            return _NOTHING if self.product is None or num_tokens > self.most else _ALL
        if self._tile(num_tokens, act) is not None:
            return _ALL_BUT_NORM if self.weight.dtype == torch.float16 else _ALL
        return _NOTHING if act or self.bias is not None else _RESIDUAL

    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.reordered:
            return self.linear(x, self.weight, self.bias, "none", [], "")
        weight, bias = self.weight, self.bias
        if self.product is not None and x.shape[0] <= self.most:
            spec = None if norm is None else (norm.weight, norm.eps)
            return cpu.linear(self.product, x, spec, act, residual)
        tile = self._tile(x.shape[0], act is not None)
        if tile is not None:
            spec = None if norm is None else (norm.weight, norm.eps)
            scratch = scratch_of(x.device)
            return fused_linear(x, weight, bias, spec, act, residual, tile, scratch)
        if residual is not None:
            return residual.addmm_(x, weight.t())
        return F.linear(x, weight, bias)


def _can_reorder(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
