# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rotary position embedding, halves form: pairs are (i, i + rot_dim / 2)."""

from __future__ import annotations

import torch

from llmserve.kernels.triton_jit import next_power_of_2, tl, triton, use_triton


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` [num_tokens, num_heads, head_dim] and `key` [num_tokens, num_kv_heads, head_dim] with
    contiguous last dimensions, `positions` int64 [num_tokens], `cos_sin_cache` float32
    [max_positions, rot_dim] (cosines, then sines). Rotates the first `rot_dim` of each head in
    float32; may write in place. Returns (query, key).
    """
    if use_triton(query):
        return apply_rotary_triton(query, key, positions, cos_sin_cache)
    return apply_rotary_torch(query, key, positions, cos_sin_cache)


def apply_rotary_torch(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference; query and key together, since a call costs more than its arithmetic."""
    num_heads = query.shape[1]
    rot_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    both = torch.cat((query, key), 1)  # [num_tokens, num_heads + num_kv_heads, head_dim]
    first, second = both[..., : rot_dim // 2].float(), both[..., rot_dim // 2 : rot_dim].float()
    out = torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ),
        -1,
    ).to(both.dtype)
    if rot_dim < both.shape[-1]:
        both[..., :rot_dim] = out
        out = both
    return out[:, :num_heads], out[:, num_heads:]


def apply_rotary_triton(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place; one program a token and head of either."""
    num_tokens, num_heads, _ = query.shape
    half = cos_sin_cache.shape[1] // 2
    if num_tokens:
        _rotary_kernel[(num_tokens, num_heads + key.shape[1])](
            query, key, positions, cos_sin_cache, num_heads,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            half, BLOCK=next_power_of_2(half), num_warps=1,
        )  # fmt: skip
    return query, key


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _rotary_kernel(
    query, key, positions, cos_sin_cache, num_heads,
    query_stride_t, query_stride_h, key_stride_t, key_stride_h,
    half, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < half
    if head < num_heads:
        row = query + token * query_stride_t + head * query_stride_h
    else:
        row = key + token * key_stride_t + (head - num_heads) * key_stride_h
    table = cos_sin_cache + tl.load(positions + token) * 2 * half
    cos = tl.load(table + cols, mask=inside, other=0.0)
    sin = tl.load(table + half + cols, mask=inside, other=0.0)
    first = tl.load(row + cols, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + half + cols, mask=inside, other=0.0).to(tl.float32)
    kind = query.dtype.element_ty
    tl.store(row + cols, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(row + half + cols, (second * cos + first * sin).to(kind), mask=inside)
