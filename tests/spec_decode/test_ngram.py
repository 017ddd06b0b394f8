# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the n-gram proposer finds."""

import numpy as np
import pytest

from llmserve.spec_decode.ngram import NgramProposer
from llmserve.spec_decode.registry import PROPOSERS


@pytest.mark.parametrize(
    ("tokens", "guess"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 7, 5, 2, 8, 1, 2], [7, 5, 2]),  # two equal tokens beat a later one
        ([2, 7, 2, 8, 2], [8, 2]),  # the latest place
        ([4, 4, 4], [4]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_propose(tokens: list[int], guess: list[int]) -> None:
    assert NgramProposer().propose(np.array(tokens, np.int32), 3).tolist() == guess


def test_registry() -> None:
    assert PROPOSERS.load("ngram") is NgramProposer
