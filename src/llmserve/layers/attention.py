# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention over the paged cache."""

import torch

from llmserve.attention.base import AttentionShape
from llmserve.kernels.rope_write import rope_write
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
        """`qkv` [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], overwritten ->
        [num_tokens, num_heads * head_dim]."""
        shape = self.shape
        kv = batch.layers[self.layer_id]
        norms = None
        if q_norm is not None and k_norm is not None:
            norms = q_norm.spec.weight, k_norm.spec.weight, q_norm.eps
        query = rope_write(
            qkv.view(qkv.shape[0], -1, shape.head_dim), shape.num_kv_heads, batch.positions,
            self.cos_sin, kv.cache, kv.metadata.slot_mapping, norms, batch.once,
        )  # fmt: skip
        return kv.backend.forward(query, kv.cache, kv.metadata).reshape(qkv.shape[0], -1)
