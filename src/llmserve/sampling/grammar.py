# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grammars: what a step's mask does not allow gets -inf."""

import numpy as np
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest, TokenMask
from llmserve.kernels.token_mask import mask_logits
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, to_device


class GrammarMask(LogitsProcessor):
    """`mask` is set for every step; it must cover exactly the rows that have a grammar."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self.mask: TokenMask | None = None

    def add(self, slot: int, request: NewRequest) -> bool:
        return request.params.grammar is not None

    def apply(self, logits: Tensor, rows: Rows) -> None:
        mask = self.mask
        assert mask is not None and np.array_equal(mask.slots, rows.slots_cpu), "rows unmasked"
        mask_logits(logits, to_device(mask.words, logits.device))
