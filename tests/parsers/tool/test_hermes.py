# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Hermes tags: as Qwen 3's published template writes them, and broken."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

HERMES = Output("hermes")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), max_size=3)


def render(content: str, calls: list[tuple[str, Any]]) -> str:
    """As Qwen 3's template does."""
    text = content
    for name, arguments in calls:
        text += "\n" if text else ""
        body = f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}'
        text += f"<tool_call>\n{body}\n</tool_call>"
    return text


@given(PLAIN, CALLS)
def test_parse_undoes_render(content: str, calls: Any) -> None:
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    assert HERMES.check_law(render(content, calls), every_cut=False) == Parsed(content, "", wanted)


CALL = [("f", '{"a": 1}')]
LAW = [
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', Parsed(calls=CALL)),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}', Parsed(calls=CALL)),  # all closers missing
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>', Parsed(calls=CALL)),
    (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": 7}</tool_call>!',
        Parsed("!", "", CALL),
    ),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', Parsed(calls=CALL)),
    ('<tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>', Parsed(calls=CALL)),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', Parsed(calls=[("f", "{}")])),
    ('<tool_call>{"name": "f"}</tool_call>', Parsed(calls=[("f", "{}")])),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>',  # a raw newline
        Parsed(calls=[("f", '{"a": "x\\ny"}')]),
    ),
    (
        '<tool_call>{"function": {"name": "f", "arguments": {"a": 1}}}</tool_call>',
        Parsed(calls=CALL),
    ),
    (" \n ", Parsed(" \n ")),
    ("The tag <tool_call> opens one.", Parsed("The tag <tool_call> opens one.")),
]


@pytest.mark.parametrize(("text", "wanted"), LAW)
def test_outputs(text: str, wanted: Parsed) -> None:
    assert HERMES.check_law(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>hello</tool_call>",
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "argum',
    ],
)
def test_what_is_no_call_is_content_in_full(text: str) -> None:
    assert HERMES.check_law(text) == Parsed(text)


def test_broken_arguments_reach_the_client_as_they_are_and_end_at_the_closer() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1 <}}</tool_call>on'
    assert HERMES.check_law(text) == Parsed("on", "", [("f", '{"a": 1 <}}')])


def test_a_bad_call_leaves_the_others() -> None:
    good = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert HERMES.check_law(f"{good}<tool_call>oh</tool_call>{good}") == Parsed(
        "<tool_call>oh</tool_call>", "", CALL * 2
    )


def test_arguments_stream_before_they_are_complete() -> None:
    parser = HERMES.parser()
    assert parser.feed('<tool_call>{"name": "f", "arguments": {"a"')[0].text == "f"
    assert [part.text for part in parser.feed(': "lon')] == [': "lon']


def test_longcat_has_other_tags() -> None:
    text = '<longcat_tool_call>{"name": "f", "arguments": {"a": 1}}</longcat_tool_call>'
    assert Output("longcat").check_law(text) == Parsed(calls=CALL)
