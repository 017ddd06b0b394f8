# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Repetition, frequency and presence penalty of whole rows in one pass."""

from __future__ import annotations

import torch

from llmserve.kernels.triton_jit import tl, triton, use_triton


def penalize(
    logits: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, strength: torch.Tensor
) -> None:
    """Changes `logits` float32 [m, width], contiguous, in place.

    `state` int32 [num_slots, width]: 2 * (times in the output) + (whether in the prompt); `slots`
    int64 [m]: each row's. `strength` float32 [m, 3]: the repetition penalty divides a positive
    logit of a token that was seen and multiplies a negative one; the frequency penalty is taken off
    for each time in the output, the presence penalty once.
    """
    if use_triton(logits):
        penalize_triton(logits, state, slots, strength)
    else:
        penalize_torch(logits, state, slots, strength)


def penalize_torch(
    logits: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, strength: torch.Tensor
) -> None:
    """The reference, in plain passes: a CPU's torch.where takes ten times as long."""
    repetition, frequency, presence = strength.unsqueeze(1).unbind(2)  # [m, 1] each
    state = state.index_select(0, slots)
    if bool((repetition != 1).any()):
        factor = (state != 0).to(torch.float32).mul_(repetition - 1).add_(1)
        torch.add(logits.clamp(min=0).div_(factor), logits.clamp(max=0).mul_(factor), out=logits)
    count = (state >> 1).to(torch.float32)
    if bool((frequency != 0).any()):
        logits.sub_(count * frequency)
    if bool((presence != 0).any()):
        logits.sub_(count.clamp_(max=1).mul_(presence))


def penalize_triton(
    logits: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, strength: torch.Tensor
) -> None:
    """One program a row and 4,096 tokens."""
    m, width = logits.shape
    if m:
        _penalize_kernel[(m, -(-width // _BLOCK))](
            logits, state, slots, strength, width, BLOCK=_BLOCK, num_warps=4
        )


_BLOCK = 4096


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=["logits"],  # a view of a batch's rows
)
def _penalize_kernel(logits, state, slots, strength, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < width
    repetition = tl.load(strength + row * 3)
    frequency = tl.load(strength + row * 3 + 1)
    presence = tl.load(strength + row * 3 + 2)
    seen = tl.load(state + tl.load(slots + row) * width + token, mask=inside, other=0)
    logit = tl.load(logits + row * width + token, mask=inside, other=0.0)
    penalized = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
    logit = tl.where(seen != 0, penalized, logit)
    count = (seen >> 1).to(tl.float32)
    logit = logit - count * frequency - tl.minimum(count, 1.0) * presence
    tl.store(logits + row * width + token, logit, mask=inside)
