# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Token embedding and the output projection."""

import torch
import torch.nn.functional as F
from torch import nn

from llmserve.layers.base import Build, Layer
from llmserve.layers.linear import Linear
from llmserve.quantization.unquantized import UnquantizedLinear


class Embedding(Layer):
    """int64 [num_tokens] -> [num_tokens, hidden], times `scale` rounded to the dtype (Gemma)."""

    weight: nn.Parameter

    def __init__(
        self, build: Build, vocab_size: int, hidden_size: int, scale: float | None = None
    ) -> None:
        super().__init__()
        table = torch.empty(vocab_size, hidden_size, dtype=build.dtype, device=build.device)
        self.new_parameter("weight", table)
        self.scale = None if scale is None else torch.tensor(scale, dtype=build.dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = F.embedding(input_ids, self.weight)
        return hidden if self.scale is None else hidden * self.scale


class LMHead(Linear):
    """Logits, always float32: with bfloat16's 8 bits the likeliest tokens often tie.

    Tied, it shares the embedding's tensor. On a CPU the product reads a float32 copy, reordered;
    on CUDA the 16-bit weight is multiplied into a float32 result.
    """

    def __init__(self, build: Build, embedding: Embedding, tied: bool) -> None:
        vocab_size, hidden_size = embedding.weight.shape
        # Tied, allocate nothing: one row, replaced at once.
        rows = 1 if tied else vocab_size
        super().__init__(build, hidden_size, (rows,), method=UnquantizedLinear())
        self.output_sizes = (vocab_size,)
        if tied:
            self.weight = embedding.weight

    def finalize(self) -> None:
        weight: torch.Tensor = self.weight.data
        self._parameters.clear()
        self.transposed = weight.t() if weight.is_cuda and weight.dtype != torch.float32 else None
        self.method.finalize({"weight": weight if weight.is_cuda else weight.float()})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> float32 [n, vocab_size]."""
        if self.transposed is not None:
            return torch.mm(hidden, self.transposed, out_dtype=torch.float32)
        return self.method.apply(hidden.float())
