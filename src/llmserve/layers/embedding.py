# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Token embedding and the output projection."""

import torch
import torch.nn.functional as F
from torch import nn

from llmserve.kernels import cpu
from llmserve.kernels.triton_jit import on_gpu
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
        if (lib := cpu.compiled_for(self.weight)) is not None:
            return cpu.embedding(lib, self.weight, input_ids, self.scale or 1.0)
        hidden = F.embedding(input_ids, self.weight)
        return hidden if self.scale is None else hidden * self.scale


class LMHead(Linear):
    """Logits, always float32: with bfloat16's 8 bits the likeliest tokens often tie.

    Tied, it shares the embedding's tensor. On CUDA a 16-bit weight is multiplied into a float32
    result. So it is on an x86 CPU, as float16 packed by FBGEMM: a bfloat16 weight loses under
    2**-25 there. Elsewhere, and where a weight is over float16's range, a float32 copy is read.
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
        half = weight.dtype != torch.float32
        self.product = cpu.product_of(weight)
        if self.product is not None:
            return
        self.transposed = weight.t() if on_gpu(weight) and half else None
        self.packed = None
        if half and not on_gpu(weight) and _fits_float16(weight):
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
            return
        self.method.finalize({"weight": weight if on_gpu(weight) else weight.float()})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> float32 [n, vocab_size]."""
        if self.product is not None:
            return cpu.linear(self.product, hidden, dtype=torch.float32)
        if self.transposed is not None:
            return torch.mm(hidden, self.transposed, out_dtype=torch.float32)
        if self.packed is not None:
            return torch.ops.quantized.linear_dynamic_fp16(hidden.float(), self.packed)
        return self.method.apply(hidden.float())


def _fits_float16(weight: torch.Tensor) -> bool:
    """Whether FBGEMM is there to multiply by it, and no value overflows."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    return weight.abs().max().item() <= torch.finfo(torch.float16).max
