# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""-inf for the tokens whose bit is not set."""

from __future__ import annotations

import math

import numpy as np
import torch

from llmserve.kernels.triton_jit import tl, triton, use_triton

_BITS = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool()  # [byte, bit], low bit first


def mask_logits(logits: torch.Tensor, words: torch.Tensor) -> None:
    """Changes `logits` float32 [n, width], rows contiguous, in place where token t's bit is 0: bit
    t % 32 of word t // 32 of its row in `words` int32 [n, ceil(width / 32)].
    """
    if use_triton(logits):
        mask_logits_triton(logits, words)
    elif logits.is_cpu:
        mask_logits_numpy(logits, words)
    else:
        mask_logits_torch(logits, words)


def mask_logits_torch(logits: torch.Tensor, words: torch.Tensor) -> None:
    """The reference."""
    bits = _BITS.to(words.device)[words.view(torch.uint8).long()].flatten(1)
    logits.masked_fill_(~bits[:, : logits.shape[1]], -math.inf)


def mask_logits_numpy(logits: torch.Tensor, words: torch.Tensor) -> None:
    """A third to a fifth of the reference's time: bits are unpacked by one pass over bytes."""
    forbidden = np.unpackbits(
        ~words.numpy().view(np.uint8), axis=1, count=logits.shape[1], bitorder="little"
    )
    logits.masked_fill_(torch.from_numpy(forbidden).view(torch.bool), -math.inf)


def mask_logits_triton(logits: torch.Tensor, words: torch.Tensor) -> None:
    """One program a row and 4,096 tokens; only what is forbidden is written."""
    n, width = logits.shape
    if n:
        _mask_kernel[(n, -(-width // _BLOCK))](
            logits, words, logits.stride(0), words.shape[1], width, BLOCK=_BLOCK, num_warps=4
        )


_BLOCK = 4096


@triton.jit(
    do_not_specialize=["stride", "num_words", "width"],
    do_not_specialize_on_alignment=["logits"],  # a view of a batch's rows
)
def _mask_kernel(logits, words, stride, num_words, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < width
    word = tl.load(words + row * num_words + token // 32, mask=inside, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + row * stride + token, float("-inf"), mask=inside & forbidden)
