# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""min_tokens: no end of text and no stop token before that many tokens."""

import math

import numpy as np
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, to_device


class MinTokens(LogitsProcessor):
    """Forbids the model's end tokens, under `ignore_eos` too, and `stop_token_ids`."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self._min_tokens = np.zeros(context.num_slots, np.int64)
        self._stop_ids: dict[int, np.ndarray] = {}

    def add(self, slot: int, request: NewRequest) -> bool:
        params = request.params
        ids = {*self.context.eos_token_ids, *params.stop_token_ids}
        num_output = len(request.token_ids) - request.num_prompt_tokens
        # Where a grammar rules, its mask says when the text may end
        if params.grammar or num_output >= params.min_tokens or not ids:
            return False
        self._min_tokens[slot] = params.min_tokens
        self._stop_ids[slot] = np.array(sorted(ids), np.int64)
        return True

    def remove(self, slot: int) -> None:
        del self._stop_ids[slot]

    def apply(self, logits: Tensor, rows: Rows) -> None:
        early = np.flatnonzero(rows.output_index_cpu < self._min_tokens[rows.slots_cpu])
        if len(early):
            slots = rows.slots_cpu
            offsets = [self._stop_ids[int(slots[i])] + i * logits.shape[1] for i in early]
            ids = to_device(np.concatenate(offsets), logits.device)
            logits.view(-1).index_fill_(0, ids, -math.inf)
