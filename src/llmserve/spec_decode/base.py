# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What proposes draft tokens."""

from abc import ABC, abstractmethod

import numpy as np


class Proposer(ABC):
    """Guesses what a request will draw next. A wrong guess costs time, never text."""

    @abstractmethod
    def propose(self, token_ids: np.ndarray, k: int) -> np.ndarray:
        """`token_ids` int32 [n], prompt and output so far -> int32 [m], m <= `k` guesses."""
