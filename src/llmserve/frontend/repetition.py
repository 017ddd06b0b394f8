# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Outputs that go round in circles."""

import numpy as np

from llmserve.core.sampling_params import RepetitionDetection


class RepetitionSearch:
    """Tokens as they come, looked through for one pattern several times in a row.

    With patterns of p tokens, the last c of them are equal if each of the last p * (c - 1) tokens
    equals the one p before it.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        low, high = detection.min_pattern_size, detection.max_pattern_size
        self._sizes = np.arange(low, high + 1)
        self._enough = self._sizes * (detection.min_count - 1)
        self._runs = np.zeros(len(self._sizes), np.int64)
        self._tokens = np.full(2 * high, -1, np.int64)
        self._end = high

    def feed(self, ids: list[int]) -> int | None:
        """How many of `ids` there are up to the first repetition, or None."""
        if not len(self._sizes):
            return None
        for count, token in enumerate(ids, 1):
            if self._end == len(self._tokens):
                self._end //= 2
                self._tokens[: self._end] = self._tokens[self._end :]
            equal = self._tokens[self._end - self._sizes] == token
            self._runs = np.where(equal, self._runs + 1, 0)
            self._tokens[self._end] = token
            self._end += 1
            if (self._runs >= self._enough).any():
                return count
        return None
