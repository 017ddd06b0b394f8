# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the worker and the loader know of a model."""

from abc import abstractmethod

import torch

from llmserve.attention.base import AttentionShape
from llmserve.core.kv_spec import AnyKVSpec
from llmserve.layers.base import Loadable
from llmserve.layers.forward_batch import ForwardBatch


class CausalLM(Loadable):
    """A text model, built as `Class(ModelDescription, Build)` and filled by model_loader/."""

    kv_specs: list[AnyKVSpec]  # by layer id
    attention_shapes: list[AttentionShape]  # by layer id
    logits_width: int

    @abstractmethod
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Final hidden states [num_tokens, hidden]."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> float32 [n, logits_width]."""
