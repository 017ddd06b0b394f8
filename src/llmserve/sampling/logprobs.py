# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log-probabilities of drawn tokens and of prompts, with the likeliest alternatives."""

import numpy as np
import torch
from torch import Tensor

from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import NewRequest
from llmserve.kernels.top_logprobs import top_logprobs
from llmserve.sampling.base import Rows, SamplerContext, to_device

_OFF = -1
_PROMPT_CHUNK = 64  # positions at a time: bounds the copy of the logits

Group = tuple[Rows, int, Tensor | None]  # rows, alternatives, int64 [m, g] tokens besides
HostColumns = tuple[Tensor, Tensor, Tensor]  # int64 [m, w], float32 [m, w], int64 [m]


class Logprobs:
    """How many alternatives every slot asked for, and which tokens besides."""

    def __init__(self, context: SamplerContext) -> None:
        self._context = context
        self._num_alternatives = np.full(context.num_slots, _OFF, np.int64)
        self._num_given = np.zeros(context.num_slots, np.int64)
        self._given: dict[int, list[int]] = {}

    def add(self, slot: int, request: NewRequest) -> None:
        """A request enters `slot`."""
        k = request.params.logprobs
        self._num_alternatives[slot] = _OFF if k is None else self._resolve(k)
        self._given[slot] = request.params.logprob_token_ids
        self._num_given[slot] = 0 if k is None else len(self._given[slot])

    def groups(self, slots: np.ndarray) -> list[Group]:
        """The rows of `slots` that asked, together with those that asked for as many."""
        wanted, given = self._num_alternatives[slots], self._num_given[slots]
        pairs = np.unique(np.stack([wanted, given], 1)[wanted != _OFF], axis=0)
        return [self._group(slots, (wanted == k) & (given == n), k, n) for k, n in pairs.tolist()]

    def _group(self, slots: np.ndarray, mask: np.ndarray, k: int, num_given: int) -> Group:
        index = np.flatnonzero(mask)
        rows = Rows(index, slots[index], self._context.device)
        if not num_given:
            return rows, k, None
        ids = np.array([self._given[slot] for slot in slots[index].tolist()], np.int64)
        return rows, k, to_device(ids, self._context.device)

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


def columns(logits: Tensor, token_ids: Tensor, k: int, given: Tensor | None = None) -> HostColumns:
    """`top_logprobs`, and behind them the tokens `given` int64 [m, g], on the host, ready once the
    device has come this far."""
    own = top_logprobs(logits, token_ids, k)
    if given is not None:
        values = logits.gather(1, given) - logits.logsumexp(1, keepdim=True)
        own = torch.cat([own[0], given], 1), torch.cat([own[1], values], 1), own[2]
    # non_blocking from a GPU goes to pinned memory
    ids, values, ranks = (part.to("cpu", non_blocking=True) for part in own)
    return ids, values, ranks
