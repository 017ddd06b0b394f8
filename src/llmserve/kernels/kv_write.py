# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Writes a step's keys and values into the paged cache."""

from __future__ import annotations

import torch

from llmserve.kernels.triton_jit import next_power_of_2, tl, triton, use_triton


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """`key`, `value` [num_tokens, num_kv_heads, head_dim] with a contiguous last dimension go to
    `kv_cache` [num_blocks, 2, num_kv_heads, block_size, head_dim] (contiguous), token t at
    `slot_mapping` int64 [num_tokens] = block * block_size + offset.
    """
    if use_triton(key):
        write_kv_triton(key, value, kv_cache, slot_mapping)
    else:
        write_kv_torch(key, value, kv_cache, slot_mapping)


def write_kv_torch(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """The reference."""
    block_size = kv_cache.shape[3]
    blocks = slot_mapping // block_size
    offsets = slot_mapping % block_size
    kv_cache[:, 0][blocks, :, offsets] = key
    kv_cache[:, 1][blocks, :, offsets] = value


def write_kv_triton(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """One program a token and head."""
    num_tokens, heads, head_dim = key.shape
    if num_tokens:
        _write_kv_kernel[(num_tokens, heads)](
            key, value, kv_cache, slot_mapping,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            kv_cache.shape[3], head_dim, BLOCK=next_power_of_2(head_dim), num_warps=1,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def _write_kv_kernel(
    key, value, kv_cache, slot_mapping,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    block_size, head_dim, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < head_dim
    slot = tl.load(slot_mapping + token)
    block = slot // block_size
    offset = slot % block_size
    k = tl.load(key + token * key_stride_t + head * key_stride_h + cols, mask=inside)
    v = tl.load(value + token * value_stride_t + head * value_stride_h + cols, mask=inside)
    k_out = kv_cache + ((block * 2 * heads + head) * block_size + offset) * head_dim
    tl.store(k_out + cols, k, mask=inside)
    tl.store(k_out + heads * block_size * head_dim + cols, v, mask=inside)
