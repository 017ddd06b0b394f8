# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""RMSNorm over the last dimension, computed in float32."""

from __future__ import annotations

import torch

from llmserve.kernels import cpu
from llmserve.kernels.triton_jit import next_power_of_2, pdl_of, tl, triton, use_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` [num_tokens, hidden] with a contiguous last dimension, `weight` [hidden] of any float
    dtype (already offset, where a model stores weight - 1). Returns a new contiguous tensor like
    `x`: x / sqrt(mean(x^2) + eps) * weight.
    """
    if use_triton(x):
        return rms_norm_triton(x, weight, eps)
    if (lib := cpu.compiled_for(x)) is not None:
        return cpu.rms_norm(lib, x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference."""
    if x.dtype == weight.dtype:  # float32 inside; F.rms_norm's wrapper costs a third more on a CPU
        return torch.rms_norm(x, weight.shape, weight, eps)
    return torch.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """One program a row."""
    num_tokens, hidden = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        block = next_power_of_2(hidden)
        _rms_norm_kernel[(num_tokens,)](
            x, weight, out, x.stride(0), hidden, eps, BLOCK=block, **pdl_of(x),
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm_kernel(
    x, weight, out, stride, hidden, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < hidden
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(x + token * stride + cols, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / hidden + eps)
    to = out + token * hidden + cols
    tl.store(to, (row * scale * w).to(out.dtype.element_ty), mask=inside)
