# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Bare JSON calls, and JSON answers that are none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

LLAMA = Output("llama3_json")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


def render(calls: list[tuple[str, Any]]) -> str:
    """As the template does, with `;` between calls."""
    return "; ".join(
        f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}' for name, arguments in calls
    )


@given(CALLS, st.sampled_from(["", "<|python_tag|>"]))
def test_parse_undoes_render(calls: Any, tag: str) -> None:
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    assert LLAMA.check_law(tag + render(calls), every_cut=False) == Parsed(calls=wanted)


@given(PLAIN)
def test_text_stays_content(content: str) -> None:
    assert LLAMA.check_law(content) == Parsed(content)


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": {"name": "f", "parameters": {}}}',
        '{"name": "Bob", "age": 3}',
        '{"name": "Bob"}',
        '{"name": "f", "parameters": [1]}',
        "{",
        "{}",
        'see {"name": "f", "parameters": {}}',
        '```json\n{"name": "f", "parameters": {}}\n```',
    ],
)
def test_json_that_is_no_call_is_content(text: str) -> None:
    assert LLAMA.check_law(text) == Parsed(text)


def test_a_json_answer_streams_as_soon_as_it_is_no_call() -> None:
    assert [part.text for part in LLAMA.parser().feed('{"answer": "lo')] == ['{"answer": "lo']


def test_text_behind_a_call_is_kept() -> None:
    text = '{"name": "f", "parameters": {"a": 1}} done'
    assert LLAMA.check_law(text) == Parsed(" done", "", [("f", '{"a": 1}')])
