# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What comes between a qkv projection and attention, in one: q/k norm, rotary embedding (halves
form: pairs are (i, i + rot_dim / 2)), cache write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmserve.kernels import cpu
from llmserve.kernels.rms_norm import rms_norm_torch
from llmserve.kernels.triton_jit import next_power_of_2, pdl_of, tl, triton, use_triton


def rope_write(
    heads: torch.Tensor,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    once: Callable[..., Any],
) -> torch.Tensor:
    """`heads` [num_tokens, num_heads + 2 num_kv_heads, head_dim], contiguous: query, key, value.
    Returns the query [num_tokens, num_heads, head_dim], normalized and rotated, which may lie in
    `heads`; the keys, treated alike, and the values go to `kv_cache` [num_blocks, 2, num_kv_heads,
    block_size, head_dim] (contiguous), token t at `slot_mapping` int64 [num_tokens] = block *
    block_size + offset.

    `positions` int64 [num_tokens], `cos_sin_cache` float32 [max_positions, rot_dim] (cosines, then
    sines; rot_dim <= head_dim). `norms`: RMSNorm weights [head_dim] of query and key, and eps.
    `once(key, function, *args)` calls the function the first time in a step that it sees the key.
    """
    if use_triton(heads):
        return rope_write_triton(
            heads, num_kv_heads, positions, cos_sin_cache, kv_cache, slot_mapping, norms
        )
    if (lib := cpu.compiled_for(heads)) is not None:
        return cpu.rope_write(
            lib, heads, num_kv_heads, positions, cos_sin_cache, kv_cache, slot_mapping, norms
        )
    # A call costs a CPU more than its arithmetic: query and key turn together, key and value are
    # written together, indices are computed once a step.
    rope = once(id(cos_sin_cache), rope_rows, positions, cos_sin_cache)
    key = (id(slot_mapping), num_kv_heads)
    rows = once(key, cache_rows, slot_mapping, num_kv_heads, kv_cache.shape[3])
    return rope_write_torch(heads, num_kv_heads, rope, kv_cache, rows, norms)


def rope_rows(
    positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, cos) and (-sin, sin) of each position, each float32 [num_tokens, 1, rot_dim]."""
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).chunk(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def cache_rows(slot_mapping: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """int64 [num_tokens * 2 * num_kv_heads]: where each token's keys, then values, lie in the cache
    [num_blocks, 2, num_kv_heads, block_size, head_dim] seen as rows of head_dim.
    """
    sides = torch.arange(2 * num_kv_heads, device=slot_mapping.device) * block_size
    offset = slot_mapping % block_size
    first = (slot_mapping - offset) * len(sides) + offset
    return (first.unsqueeze(1) + sides).flatten()


def rope_write_torch(
    heads: torch.Tensor,
    num_kv_heads: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """The reference, and the way of a CPU without compiled kernels. `rope` and `rows` are what the
    two functions above give."""
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if norms is not None:
        q_weight, k_weight, eps = norms
        key, value = heads[:, num_heads:].chunk(2, 1)
        query, key = (
            rms_norm_torch(part, weight, eps)
            for part, weight in ((heads[:, :num_heads], q_weight), (key, k_weight))
        )
        heads = torch.cat((query, key, value), 1)
    cos, sin = rope
    rot_dim = cos.shape[-1]
    head_dim = heads.shape[-1]
    turned = heads.narrow(1, 0, num_heads + num_kv_heads)
    if rot_dim < head_dim:
        turned = turned.narrow(2, 0, rot_dim)
    # With float32 factors, products and their sum are float32, rounded once.
    torch.addcmul(turned * cos, turned.roll(rot_dim // 2, -1), sin, out=turned)
    written = heads.narrow(1, num_heads, 2 * num_kv_heads).reshape(-1, head_dim)
    kv_cache.view(-1, head_dim).index_copy_(0, rows, written)
    return heads.narrow(1, 0, num_heads)


def rope_write_triton(
    heads: torch.Tensor,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """One program a head and some tokens; the query stays in place."""
    num_tokens, all_heads, head_dim = heads.shape
    q_weight, k_weight, eps = norms or (heads, heads, 0.0)
    rot_dim = cos_sin_cache.shape[1]
    tokens, warps = tile_of(num_tokens)
    if num_tokens:
        _rope_write_kernel[(-(-num_tokens // tokens), all_heads)](
            heads, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, kv_cache,
            num_tokens, num_kv_heads, kv_cache.shape[3], eps,
            HEAD_DIM=head_dim, HALF=rot_dim // 2, TILE_T=tokens,
            TILE_H=next_power_of_2(rot_dim // 2),
            TILE_R=next_power_of_2(head_dim - rot_dim) if head_dim > rot_dim else 0,
            NORM=norms is not None, **pdl_of(heads), num_warps=warps,
        )  # fmt: skip
    return heads.narrow(1, 0, all_heads - 2 * num_kv_heads)


def tile_of(num_tokens: int) -> tuple[int, int]:
    """(tokens, warps) of a program: few tokens are spread wide, many are streamed."""
    return (1, 1) if num_tokens <= 128 else (16, 4)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["positions", "slot_mapping"],
)
def _rope_write_kernel(
    heads, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, kv_cache,
    num_tokens, num_kv_heads, block_size, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, TILE_T: tl.constexpr, TILE_H: tl.constexpr,
    TILE_R: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    all_heads = tl.num_programs(1)
    num_heads = all_heads - 2 * num_kv_heads
    token = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    there = token < num_tokens
    token = token.to(tl.int64)
    cols = tl.arange(0, TILE_H)
    inside = there[:, None] & (cols < HALF)[None, :]
    kind = heads.dtype.element_ty
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = heads + (token * all_heads + head)[:, None] * HEAD_DIM
    row = start + cols[None, :]
    first = tl.load(row, mask=inside, other=0.0)
    second = tl.load(row + HALF, mask=inside, other=0.0)
    if TILE_R > 0:  # what is not rotated
        rest_cols = tl.arange(0, TILE_R)
        rest_inside = there[:, None] & (rest_cols < HEAD_DIM - 2 * HALF)[None, :]
        rest_row = start + 2 * HALF + rest_cols[None, :]
        rest = tl.load(rest_row, mask=rest_inside, other=0.0)
    if head < num_heads + num_kv_heads:
        if NORM:
            x, y = first.to(tl.float32), second.to(tl.float32)
            squares = tl.sum(x * x, 1) + tl.sum(y * y, 1)
            if TILE_R > 0:
                squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
            scale = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
            weight = q_weight
            if head >= num_heads:
                weight = k_weight
            low = tl.load(weight + cols, mask=cols < HALF, other=0.0).to(tl.float32)
            high = tl.load(weight + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)
            # Rounded here as by a norm of its own
            first, second = (
                (x * scale * low[None, :]).to(kind),
                (y * scale * high[None, :]).to(kind),
            )
            if TILE_R > 0:
                last = tl.load(
                    weight + 2 * HALF + rest_cols, mask=rest_cols < HEAD_DIM - 2 * HALF, other=0.0
                ).to(tl.float32)
                rest = (rest.to(tl.float32) * scale * last[None, :]).to(kind)
        table = cos_sin_cache + tl.load(positions + token, mask=there, other=0)[:, None] * 2 * HALF
        cos = tl.load(table + cols[None, :], mask=inside, other=0.0)
        sin = tl.load(table + HALF + cols[None, :], mask=inside, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first, second = (x * cos - y * sin).to(kind), (y * cos + x * sin).to(kind)
    if head < num_heads:
        tl.store(row, first, mask=inside)
        tl.store(row + HALF, second, mask=inside)
        if TILE_R > 0:
            tl.store(rest_row, rest, mask=rest_inside)
    else:
        slot = tl.load(slot_mapping + token, mask=there, other=0)
        # Keys of all heads, then values: head - num_heads counts through both
        side = (slot // block_size) * (2 * num_kv_heads) + (head - num_heads)
        target = kv_cache + (side * block_size + slot % block_size)[:, None] * HEAD_DIM
        tl.store(target + cols[None, :], first, mask=inside)
        tl.store(target + HALF + cols[None, :], second, mask=inside)
        if TILE_R > 0:
            tl.store(target + 2 * HALF + rest_cols[None, :], rest, mask=rest_inside)
