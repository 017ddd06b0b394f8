# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a model's forward gets besides its weights."""

from dataclasses import dataclass

import torch

from llmserve.attention.base import AttentionBackend, AttentionMetadata


@dataclass(slots=True)
class LayerKV:
    """What the attention layer of one layer id works with in this step."""

    cache: (
        torch.Tensor
    )  # [num_blocks, 2, num_kv_heads, block_size, head_dim]; MLA: [num_blocks, block_size, dim]
    backend: AttentionBackend
    metadata: AttentionMetadata  # of the layer's KV group


@dataclass(slots=True)
class ForwardBatch:
    """One step, flattened over its rows; there is no batch dimension.

    `Model.forward(batch)` returns hidden states [num_tokens, hidden]; `Model.logits(hidden)` takes
    the rows picked by `logits_rows`.
    """

    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    logits_rows: torch.Tensor  # int64 [num_sampled]: last token of each row that draws
    layers: list[LayerKV]  # by layer id
