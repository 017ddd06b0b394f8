# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Repetition penalty over prompt and output, presence and frequency penalty over the output."""

import numpy as np
import torch
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.kernels.penalties import penalize
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, slot_buffer, to_device


class Penalties(LogitsProcessor):
    """One int32 per slot and token: 2 * (times in the output) + (whether in the prompt)."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        shape = (context.num_slots, context.logits_width)
        self._state = slot_buffer(shape, torch.int32, context.device)
        # repetition, frequency, presence
        self._strength = np.zeros((context.num_slots, 3), np.float32)
        self._rows: Rows | None = None
        self._of_rows = torch.empty(0, 3)

    def add(self, slot: int, request: NewRequest) -> bool:
        p = request.params
        strength = (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
        if strength == (1.0, 0.0, 0.0):
            return False
        self._strength[slot] = strength
        prompt, output = np.split(request.token_ids, [request.num_prompt_tokens])
        state = 2 * np.bincount(output, minlength=self.context.logits_width).astype(np.int32)
        state[prompt] += 1 - state[prompt] % 2
        self._state[slot] = to_device(state, self._state.device)
        return True

    def apply(self, logits: Tensor, rows: Rows) -> None:
        if self._rows is not rows:
            self._of_rows = to_device(self._strength[rows.slots_cpu], logits.device)
            self._rows = rows
        penalize(logits, self._state, rows.slots, self._of_rows)

    def update(self, rows: Rows, token_ids: Tensor) -> None:
        drawn = rows.slots * self.context.logits_width + token_ids
        self._state.view(-1).index_add_(0, drawn, torch.full_like(drawn, 2, dtype=torch.int32))
