# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""logit_bias: added to the logits of single tokens."""

from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, SparseEntries


class LogitBias(LogitsProcessor):
    """Adds the request's biases."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self._entries = SparseEntries(context)

    def add(self, slot: int, request: NewRequest) -> bool:
        bias = request.params.logit_bias
        if bias:
            self._entries.set(slot, list(bias), list(bias.values()))
        return bool(bias)

    def remove(self, slot: int) -> None:
        self._entries.clear(slot)

    def apply(self, logits: Tensor, rows: Rows) -> None:
        offsets, values = self._entries.join(rows)
        logits.view(-1).index_add_(0, offsets, values)
