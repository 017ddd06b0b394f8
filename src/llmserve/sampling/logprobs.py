# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log-probabilities of drawn tokens and of prompts, with the likeliest alternatives."""

import numpy as np
import torch
from torch import Tensor

from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import NewRequest
from llmserve.kernels.top_logprobs import top_logprobs
from llmserve.sampling.base import Rows, SamplerContext

_OFF = -1
_PROMPT_CHUNK = 64  # positions at a time: bounds the copy of the logits

HostColumns = tuple[Tensor, Tensor, Tensor]  # int64 [m, k + 1], float32 [m, k + 1], int64 [m]


class Logprobs:
    """How many alternatives every slot asked for."""

    def __init__(self, context: SamplerContext) -> None:
        self._context = context
        self._num_alternatives = np.full(context.num_slots, _OFF, np.int64)

    def add(self, slot: int, request: NewRequest) -> None:
        """A request enters `slot`."""
        k = request.params.logprobs
        self._num_alternatives[slot] = _OFF if k is None else self._resolve(k)

    def groups(self, slots: np.ndarray) -> list[tuple[Rows, int]]:
        """The rows of `slots` that asked, together with those that asked for as many."""
        wanted = self._num_alternatives[slots]
        return [
            (Rows(index, slots[index], self._context.device), int(k))
            for k in np.unique(wanted[wanted != _OFF])
            for index in [np.flatnonzero(wanted == k)]
        ]

    def prompt(self, logits: Tensor, targets: Tensor, k: int) -> LogprobColumns:
        """`Sampler.prompt_logprobs`; waits for the device."""
        parts = [
            columns(logits[rows], targets[rows], self._resolve(k))
            for start in range(0, len(targets), _PROMPT_CHUNK)
            for rows in [slice(start, start + _PROMPT_CHUNK)]
        ]
        if logits.device.type == "cuda":
            torch.cuda.current_stream(logits.device).synchronize()
        ids, values, ranks = (torch.cat(part) for part in zip(*parts, strict=True))
        return LogprobColumns.pack(ids.numpy(), values.numpy(), ranks.numpy())

    def _resolve(self, k: int) -> int:
        return self._context.logits_width if k == -1 else k


def columns(logits: Tensor, token_ids: Tensor, k: int) -> HostColumns:
    """`top_logprobs` on the host, ready once the device has come this far."""
    # non_blocking from a GPU goes to pinned memory
    ids, values, ranks = (
        part.to("cpu", non_blocking=True) for part in top_logprobs(logits, token_ids, k)
    )
    return ids, values, ranks
