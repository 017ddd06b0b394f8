# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The CPU's fused form against the two kernels that it stands for."""

import pytest
import torch

from llmserve.kernels.kv_write import write_kv_torch
from llmserve.kernels.rope_write import cache_rows, rope_rows, rope_write
from llmserve.kernels.rotary import apply_rotary_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "rot_dim", "block_size"),
    [(1, 4, 2, 32, 32, 16), (7, 9, 3, 64, 64, 16), (33, 4, 4, 16, 16, 8), (5, 4, 1, 32, 16, 32)],
)
def test_equals_rotary_then_write(
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rot_dim: int,
    block_size: int,
) -> None:
    packed = torch.randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    positions = torch.randint(0, 100, (tokens,))
    cos_sin = torch.randn(100, rot_dim)
    slots = torch.randperm(6 * block_size)[:tokens] + block_size
    caches = [torch.full((8, 2, kv_heads, block_size, dim), torch.nan, dtype=dtype)] * 2
    caches = [cache.clone() for cache in caches]

    query, key, value = (part.clone() for part in packed.split((heads, kv_heads, kv_heads), 1))
    if rot_dim == dim:
        query, key = apply_rotary_torch(query, key, positions, cos_sin)
    else:
        turned = apply_rotary_torch(
            query[..., :rot_dim].contiguous(), key[..., :rot_dim].contiguous(), positions, cos_sin
        )
        query = torch.cat((turned[0], query[..., rot_dim:]), -1)
        key = torch.cat((turned[1], key[..., rot_dim:]), -1)
    write_kv_torch(key, value, caches[0], slots)

    rows = cache_rows(slots, kv_heads, block_size)
    rope_write(packed, kv_heads, rope_rows(positions, cos_sin), caches[1], rows)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    )
    torch.testing.assert_close(packed[:, :heads], query, **tolerance)
    torch.testing.assert_close(caches[1], caches[0], equal_nan=True, **tolerance)
