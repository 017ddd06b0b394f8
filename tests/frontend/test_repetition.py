# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random

import pytest

from llmserve.core.sampling_params import RepetitionDetection
from llmserve.errors import RequestError
from llmserve.frontend.repetition import RepetitionSearch


def _first(tokens: list[int], low: int, high: int, count: int) -> int | None:
    """By the definition."""
    for end in range(1, len(tokens) + 1):
        for size in range(low, high + 1):
            last = tokens[max(0, end - size * count) : end]
            if len(last) == size * count and last == last[:size] * count:
                return end
    return None


def test_it_finds_what_the_definition_says() -> None:
    rng = random.Random(1)
    found = 0
    for _ in range(300):
        low = rng.randrange(1, 4)
        high, count = rng.randrange(low, 6), rng.randrange(2, 4)
        tokens = rng.choices(range(rng.randrange(2, 5)), k=rng.randrange(40))
        search = RepetitionSearch(
            RepetitionDetection(max_pattern_size=high, min_pattern_size=low, min_count=count)
        )
        wanted = _first(tokens, low, high, count)
        cut = rng.randrange(len(tokens) + 1)
        first = search.feed(tokens[:cut])
        if first is None:
            rest = search.feed(tokens[cut:])
            first = None if rest is None else cut + rest
        assert first == wanted, (tokens, low, high, count)
        found += wanted is not None
    assert 100 < found < 290


def test_a_size_of_none_finds_none() -> None:
    assert RepetitionSearch(RepetitionDetection()).feed([1] * 99) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"max_pattern_size": -1},
        {"max_pattern_size": 1025},
        {"max_pattern_size": 2, "min_pattern_size": 3},
        {"max_pattern_size": 2, "min_pattern_size": 0},
        {"max_pattern_size": 2, "min_count": 1},
    ],
)
def test_ranges(fields: dict[str, int]) -> None:
    with pytest.raises(RequestError):
        RepetitionDetection(**fields)
