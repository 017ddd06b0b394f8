# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import random

import pytest

from llmserve.api import json_bounds
from llmserve.api.json_bounds import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, JsonBounds
from llmserve.errors import RequestError


def feed(data: bytes, *cuts: int) -> JsonBounds:
    bounds = JsonBounds()
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        bounds.feed(data[start:end])
    return bounds


def random_value(rng: random.Random, depth: int) -> object:
    if depth and rng.random() < 0.7:
        children = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
        if rng.random() < 0.5:
            return children
        return {f'k{i}"{{[\\': child for i, child in enumerate(children)}
    return rng.choice([1, None, 'a"b', '\\"[{', "[[[[", "\\", '\\\\"', "}]}]", "\n,\t,", "é]"])


def count(value: object) -> tuple[int, int, int]:
    """Containers, commas and depth."""
    if not isinstance(value, dict | list):
        return 0, 0, 0
    inner = [count(v) for v in (value.values() if isinstance(value, dict) else value)]
    commas = max(len(inner) - 1, 0) + sum(c for _, c, _ in inner)
    return 1 + sum(n for n, _, _ in inner), commas, 1 + max((d for _, _, d in inner), default=0)


@pytest.mark.parametrize("seed", range(20))
def test_counts_equal_those_of_a_parser_wherever_the_text_is_cut(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        value = random_value(rng, 5)
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        containers, commas, _ = count(value)
        for cuts in ([], *(sorted(rng.sample(range(len(data)), min(3, len(data)))),) * 3):
            bounds = feed(data, *cuts)
            assert (bounds._num_containers, bounds._num_values) == (containers, commas)
            assert (bounds._depth, bounds._in_string) == (0, False)


@pytest.mark.parametrize("cuts", [(), (1,), (100,)])
def test_depth(cuts: tuple[int, ...]) -> None:
    feed(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, *cuts)
    feed(b'"' + b"[" * 1000 + b'"', *cuts)
    feed(b"[]" * 1000, *cuts)
    with pytest.raises(RequestError, match="nested too deeply"):
        feed(b'[{"a":' * (MAX_DEPTH // 2 + 1), *cuts)


def test_numbers_of_values() -> None:
    feed(b"[" + b"[]," * (MAX_CONTAINERS - 2) + b"[]]")
    with pytest.raises(RequestError, match="arrays and objects"):
        feed(b"[" + b"{}," * MAX_CONTAINERS)
    feed(b"[" + b"1," * MAX_VALUES + b"1]")
    with pytest.raises(RequestError, match="values"):
        feed(b"[" + b"1," * (MAX_VALUES + 1), 1000)


def test_refusal_comes_with_the_chunk_that_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_bounds, "MAX_CONTAINERS", 10)
    bounds = JsonBounds()
    bounds.feed(b"[" * 10)
    with pytest.raises(RequestError):
        bounds.feed(b"[")
