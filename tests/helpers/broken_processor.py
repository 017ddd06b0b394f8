# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A logits processor that fails for some requests, or takes its time: what T11 and T15 plant."""

import time

from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext

IN_ADD, IN_APPLY, IN_UPDATE, IN_REMOVE, SLOW = range(9101, 9106)  # seeds of such requests
STEP_S = 0.08  # of one with a slow request


class Broken(LogitsProcessor):
    """Raises, or sleeps, where the request's seed says."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self._seeds: dict[int, int] = {}

    def add(self, slot: int, request: NewRequest) -> bool:
        if request.seed == IN_ADD:
            raise KeyError("planted")
        self._seeds[slot] = request.seed
        return IN_ADD < request.seed <= SLOW

    def remove(self, slot: int) -> None:
        if self._seeds.pop(slot) == IN_REMOVE:
            raise KeyError("planted")

    def apply(self, logits: Tensor, rows: Rows) -> None:
        for slot, index in zip(rows.slots_cpu.tolist(), rows.output_index_cpu, strict=True):
            logits.mul_(-1)  # so that one which is not undone shows
            logits.mul_(-1)
            if self._seeds[slot] == IN_APPLY and index == 2:
                logits.fill_(7.0)
                raise KeyError("planted")
            if self._seeds[slot] == SLOW:
                time.sleep(STEP_S)

    def update(self, rows: Rows, token_ids: Tensor) -> None:
        for slot, index in zip(rows.slots_cpu.tolist(), rows.output_index_cpu, strict=True):
            if self._seeds[slot] == IN_UPDATE and index == 2:
                raise KeyError("planted")
