# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""allowed_token_ids: everything else gets -inf."""

import math

from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, SparseEntries


class AllowedTokens(LogitsProcessor):
    """Keeps the request's list."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self._entries = SparseEntries(context)

    def add(self, slot: int, request: NewRequest) -> bool:
        ids = request.params.allowed_token_ids
        if ids is None:
            return False
        self._entries.set(slot, ids, [0.0] * len(ids))
        return True

    def remove(self, slot: int) -> None:
        self._entries.clear(slot)

    def apply(self, logits: Tensor, rows: Rows) -> None:
        offsets, _ = self._entries.join(rows)
        flat = logits.view(-1)
        kept = flat[offsets]
        logits.fill_(-math.inf)
        flat[offsets] = kept
