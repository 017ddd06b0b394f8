# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention over the paged cache."""

import torch

from llmserve.attention.base import AttentionShape
from llmserve.kernels.kv_write import write_kv
from llmserve.kernels.rotary import apply_rotary
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
