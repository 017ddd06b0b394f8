# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention over the paged cache."""

import torch

from llmserve.attention.base import AttentionShape
from llmserve.kernels.kv_write import write_kv
from llmserve.kernels.rope_write import cache_rows, rope_rows, rope_write
from llmserve.kernels.rotary import apply_rotary
from llmserve.kernels.triton_jit import use_triton
from llmserve.layers.base import Layer
from llmserve.layers.forward_batch import ForwardBatch
from llmserve.layers.norm import RMSNorm


class Attention(Layer):
    """q/k norm, rope, cache write, attention. Weights are its caller's, so that names stay the
    checkpoint's. `cos_sin` float32 [max_model_len, head_dim], shared between layers."""

    def __init__(self, layer_id: int, shape: AttentionShape, cos_sin: torch.Tensor) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.shape = shape
        self.cos_sin = cos_sin

    def forward(
        self,
        qkv: torch.Tensor,
        batch: ForwardBatch,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """`qkv` [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] ->
        [num_tokens, num_heads * head_dim]."""
        shape = self.shape
        kv = batch.layers[self.layer_id]
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        if not use_triton(heads):
            query = self._rotate_and_write(heads, batch, q_norm, k_norm)
            return kv.backend.forward(query, kv.cache, kv.metadata).reshape(len(qkv), -1)
        query, key, value = heads.split(
            (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), 1
        )
        if q_norm is not None:
            query = q_norm(query)
        if k_norm is not None:
            key = k_norm(key)
        query, key = apply_rotary(query, key, batch.positions, self.cos_sin)
        write_kv(key, value, kv.cache, kv.metadata.slot_mapping)
        return kv.backend.forward(query, kv.cache, kv.metadata).reshape(len(qkv), -1)

    def _rotate_and_write(
        self,
        heads: torch.Tensor,
        batch: ForwardBatch,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ) -> torch.Tensor:
        """The CPU's way of the same: -> query [num_tokens, num_heads, head_dim]."""
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        if q_norm is not None and k_norm is not None:
            key, value = heads[:, num_heads:].chunk(2, 1)
            heads = torch.cat((q_norm(heads[:, :num_heads]), k_norm(key), value), 1)
        kv = batch.layers[self.layer_id]
        slots, size = kv.metadata.slot_mapping, kv.metadata.block_size
        rope = batch.once(id(self.cos_sin), rope_rows, batch.positions, self.cos_sin)
        rows = batch.once((id(slots), num_kv_heads), cache_rows, slots, num_kv_heads, size)
        rope_write(heads, num_kv_heads, rope, kv.cache, rows)
        return heads.narrow(1, 0, num_heads)
