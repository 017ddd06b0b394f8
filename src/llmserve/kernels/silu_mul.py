# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gated activations: act(gate) * up over the two halves of a projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmserve.kernels import cpu
from llmserve.kernels.triton_jit import pdl_of, tl, triton, use_triton


def gated_act(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`x` [num_tokens, 2 * intermediate], contiguous: gate then up. `kind` is "silu" or
    "gelu_tanh" (the tanh form). Returns [num_tokens, intermediate].
    """
    if use_triton(x):
        return gated_act_triton(x, kind)
    if (lib := cpu.compiled_for(x)) is not None:
        return cpu.gated_act(lib, x, kind)
    return gated_act_torch(x, kind)


def gated_act_torch(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The reference."""
    gate, up = x.chunk(2, -1)
    return (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")).mul_(up)


def gated_act_triton(x: torch.Tensor, kind: str) -> torch.Tensor:
    """One program a token and 1,024 columns."""
    num_tokens, intermediate = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_tokens, intermediate, dtype=x.dtype, device=x.device)
    if num_tokens:
        _gated_act_kernel[(num_tokens, -(-intermediate // _BLOCK))](
            x, out, intermediate, GELU=kind == "gelu_tanh", BLOCK=_BLOCK, **pdl_of(x), num_warps=4
        )
    return out


_BLOCK = 1024


@triton.jit
def gated_act_of(gate, up, GELU: tl.constexpr):
    """act(gate) * up of float32 tiles."""
    inner = gate
    if GELU:  # 0.5 * (1 + tanh(y)) == sigmoid(2 * y)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(inner) * up


@triton.jit
def _gated_act_kernel(
    x, out, intermediate, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < intermediate
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(x + token * 2 * intermediate + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + (token * 2 + 1) * intermediate + cols, mask=inside, other=0.0).to(tl.float32)
    value = gated_act_of(gate, up, GELU).to(out.dtype.element_ty)
    tl.store(out + token * intermediate + cols, value, mask=inside)
