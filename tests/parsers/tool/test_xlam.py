# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A bare array."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, Output, Parsed, loaded

XLAM = Output("xlam")


@given(st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3), st.sampled_from(["", "\n"]))
def test_parse_undoes_render(calls: list[tuple[str, Any]], space: str) -> None:
    text = space + json.dumps([{"name": name, "arguments": value} for name, value in calls])
    found = XLAM.check_law(text, every_cut=False)
    assert (found.content, loaded(found)) == ("", calls)


def test_at_every_cut() -> None:
    text = '[{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]'
    assert XLAM.check_law(text) == Parsed(calls=[("f", '{"a": "]"}'), ("g", "{}")])


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[]", '[{"name": "Ann", "age": 5}]', 'so: [{"name": "f", "arguments": {}}]']
)
def test_other_arrays_are_content(text: str) -> None:
    assert XLAM.check_law(text) == Parsed(text)


def test_reasoning_comes_first() -> None:
    text = '<think>hm</think>\n\n[{"name": "f", "arguments": {}}]'
    assert Output("xlam", "think").check_law(text) == Parsed("", "hm", [("f", "{}")])
