# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rotary embedding and cache write on a CPU, where a call costs more than its arithmetic: query and
key turn together, key and value are written together, indices are computed once a step.
"""

import torch


def rope_rows(
    positions: torch.Tensor, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`positions` int64 [num_tokens], `cos_sin_cache` float32 [max_positions, rot_dim] ->
    (cos, cos) and (-sin, sin), each float32 [num_tokens, 1, rot_dim].
    """
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


def rope_write(
    heads: torch.Tensor,
    num_kv_heads: int,
    rope: tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """`heads` [num_tokens, num_heads + 2 num_kv_heads, head_dim]: query, key, value. Rotates the
    first rot_dim of query and key in place, then writes key and value to `kv_cache` (contiguous).
    `rope` and `rows` are what the two functions above return.
    """
    cos, sin = rope
    rot_dim = cos.shape[-1]
    head_dim = heads.shape[-1]
    turned = heads.narrow(1, 0, heads.shape[1] - num_kv_heads)
    if rot_dim < head_dim:
        turned = turned.narrow(2, 0, rot_dim)
    # With float32 factors, products and their sum are float32, rounded once.
    torch.addcmul(turned * cos, turned.roll(rot_dim // 2, -1), sin, out=turned)
    written = heads.narrow(1, heads.shape[1] - 2 * num_kv_heads, 2 * num_kv_heads)
    written = written.reshape(-1, head_dim)
    kv_cache.view(-1, head_dim).index_copy_(0, rows, written)
