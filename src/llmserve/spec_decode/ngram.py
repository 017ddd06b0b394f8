# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Drafts by looking up the last tokens earlier in the same request."""

import numpy as np

from llmserve.spec_decode.base import Proposer


class NgramProposer(Proposer):
    """What followed the latest earlier place of the longest suffix of up to `max_n` tokens."""

    def __init__(self, max_n: int = 4) -> None:
        self.max_n = max_n

    def propose(self, token_ids: np.ndarray, k: int) -> np.ndarray:
        """See Proposer."""
        for n in range(min(self.max_n, len(token_ids) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(token_ids[:-1], n)
            found = np.flatnonzero((windows == token_ids[-n:]).all(1))
            if len(found):
                start = found[-1] + n
                return token_ids[start : start + k]
        return token_ids[:0]
