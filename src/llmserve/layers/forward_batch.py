# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a model's forward gets besides its weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llmserve.attention.base import AttentionBackend, AttentionMetadata


@dataclass(slots=True)
class LayerKV:
    """What the attention layer of one layer id works with in this step."""

    # [num_blocks, 2, num_kv_heads, block_size, head_dim]; MLA: [num_blocks, block_size, dim]
    cache: torch.Tensor
    backend: AttentionBackend
    metadata: AttentionMetadata  # of the layer's KV group


@dataclass(slots=True)
class ForwardBatch:
    """One step, flattened over its rows; there is no batch dimension.

    `Model.forward(batch)` returns hidden states [num_tokens, hidden]; `Model.logits(hidden)` takes
    those that are drawn from or scored.
    """

    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    layers: list[LayerKV]  # by layer id
    _shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`, called by the first layer that asks for `key` in this step."""
        if key not in self._shared:
            self._shared[key] = compute(*args)
        return self._shared[key]
