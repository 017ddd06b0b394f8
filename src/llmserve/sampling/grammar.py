# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grammars and budgets of reasoning: what a step's mask does not allow gets -inf."""

import numpy as np
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest, TokenMask
from llmserve.kernels.token_mask import mask_logits
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, to_device


class GrammarMask(LogitsProcessor):
    """`mask` is set for every step; it must cover exactly the rows that have a grammar or a budget.
    A step in which only budgets could bind, and none does, has none."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self.mask: TokenMask | None = None
        self._has_grammar = np.zeros(context.num_slots, np.bool_)

    def add(self, slot: int, request: NewRequest) -> bool:
        self._has_grammar[slot] = request.params.grammar is not None
        return request.params.masked

    def words(self, rows: Rows) -> np.ndarray | None:
        """The step's mask, int32 [m, ceil(logits_width / 32)]."""
        mask = self.mask
        if mask is None and not self._has_grammar[rows.slots_cpu].any():
            return None
        assert mask is not None and np.array_equal(mask.slots, rows.slots_cpu), "rows unmasked"
        return mask.words

    def apply(self, logits: Tensor, rows: Rows) -> None:
        words = self.words(rows)
        if words is not None:
            mask_logits(logits, to_device(words, logits.device))
