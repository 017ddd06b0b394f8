# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log-probabilities of drawn tokens and of prompts, with the likeliest alternatives."""

import numpy as np
import torch
from torch import Tensor

from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import NewRequest
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
            columns(logits[rows].log_softmax(1), targets[rows], self._resolve(k))
            for start in range(0, len(targets), _PROMPT_CHUNK)
            for rows in [slice(start, start + _PROMPT_CHUNK)]
        ]
        if logits.device.type == "cuda":
            torch.cuda.current_stream(logits.device).synchronize()
        ids, values, ranks = (torch.cat(part) for part in zip(*parts, strict=True))
        return LogprobColumns.pack(ids.numpy(), values.numpy(), ranks.numpy())

    def _resolve(self, k: int) -> int:
        return self._context.logits_width if k == -1 else k


def columns(logprobs: Tensor, token_ids: Tensor, k: int) -> HostColumns:
    """Columns on the host, ready once the device has come this far.

    `logprobs` float32 [m, width], `token_ids` int64 [m]. Column 0 is the token itself, then the
    `k` likeliest; ranks are 1 + the count of strictly likelier tokens.
    """
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > own).sum(1) + 1
    ids = token_ids[:, None]
    if k:
        likeliest = logprobs.topk(k, dim=1)
        own = torch.cat([own, likeliest.values], 1)
        ids = torch.cat([ids, likeliest.indices], 1)
    # non_blocking from a GPU goes to pinned memory
    return (
        ids.to("cpu", non_blocking=True),
        own.to("cpu", non_blocking=True),
        ranks.to("cpu", non_blocking=True),
    )
