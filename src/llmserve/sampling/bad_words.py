# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""bad_words: the last token of a word is forbidden where the output ends with the rest of it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmserve.core.sampling_params import MAX_BAD_WORD_TOKENS
from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, slot_buffer, to_device


@dataclass
class _Words:
    """Words of one slot, or of some rows: w of them, with p tokens before their last ones."""

    last: np.ndarray  # int64 [w]
    token: np.ndarray  # int64 [p]
    back: np.ndarray  # int64 [p], 1 = the latest output token
    word: np.ndarray  # int64 [p], which word it belongs to


class BadWords(LogitsProcessor):
    """Compares every word with a ring of each slot's latest output tokens, on the device."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        shape = (context.num_slots, MAX_BAD_WORD_TOKENS)
        # Token of output index t is at [slot, t % MAX_BAD_WORD_TOKENS]
        self._ring = slot_buffer(shape, torch.int64, context.device)
        self._words: dict[int, _Words] = {}
        self._rows: Rows | None = None
        self._joined: tuple[Tensor, ...] = ()

    def add(self, slot: int, request: NewRequest) -> bool:
        words = [word for word in request.params.bad_words_token_ids if word]
        if not words:
            return False
        self._words[slot] = _Words(
            last=np.array([word[-1] for word in words], np.int64),
            token=np.array([token for word in words for token in word[:-1]], np.int64),
            back=np.array([b for word in words for b in range(len(word) - 1, 0, -1)], np.int64),
            word=np.repeat(np.arange(len(words)), [len(word) - 1 for word in words]),
        )
        output = request.token_ids[request.num_prompt_tokens :].astype(np.int64)
        index = np.arange(len(output))[-MAX_BAD_WORD_TOKENS:]
        ring = np.zeros(MAX_BAD_WORD_TOKENS, np.int64)
        ring[index % MAX_BAD_WORD_TOKENS] = output[index]
        self._ring[slot] = to_device(ring, self._ring.device)
        return True

    def remove(self, slot: int) -> None:
        del self._words[slot]

    def apply(self, logits: Tensor, rows: Rows) -> None:
        if self._rows is not rows:
            self._joined, self._rows = self._join(rows), rows
        target, row, slot, back, token, word = self._joined
        position = rows.output_index[row] - back
        seen = self._ring[slot, position % MAX_BAD_WORD_TOKENS]
        differs = ((seen != token) | (position < 0)).to(torch.float32)
        num_differing = torch.zeros_like(target, dtype=torch.float32).index_add_(0, word, differs)
        forbid = torch.zeros_like(num_differing).masked_fill_(num_differing == 0, -math.inf)
        logits.view(-1).index_add_(0, target, forbid)

    def update(self, rows: Rows, token_ids: Tensor) -> None:
        self._ring[rows.slots, rows.output_index % MAX_BAD_WORD_TOKENS] = token_ids

    def _join(self, rows: Rows) -> tuple[Tensor, ...]:
        slots = rows.slots_cpu
        words = [self._words[slot] for slot in slots.tolist()]
        num_words = [len(w.last) for w in words]
        first = np.cumsum([0, *num_words[:-1]])
        row = np.repeat(np.arange(len(words)), [len(w.token) for w in words])
        width = self.context.logits_width
        parts = (
            np.concatenate([w.last + i * width for i, w in enumerate(words)]),
            row,
            slots[row],
            np.concatenate([w.back for w in words]),
            np.concatenate([w.token for w in words]),
            np.concatenate([w.word + first[i] for i, w in enumerate(words)]),
        )
        return tuple(to_device(part, self.context.device) for part in parts)
