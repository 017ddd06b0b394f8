# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gemma's literals."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import PLAIN, TEXTS, Output, Parsed, loaded

GEMMA = Output("gemma4", "gemma4")
QUOTE = '<|"|>'
STRINGS = TEXTS.filter(lambda text: QUOTE not in text and "<escape>" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), VALUES, max_size=3)


def literal(value: Any) -> str:
    """As the template writes it."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    return json.dumps(value)


@given(PLAIN, st.lists(ARGUMENTS, max_size=2))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]]) -> None:
    text = f"<|channel>thought\nso\n<channel|>{content}"
    text += "".join(f"<|tool_call>call:f{literal(value)}<tool_call|>" for value in calls)
    found = GEMMA.check_law(text, every_cut=False)
    assert found[:2] == (content, "so")
    assert loaded(found) == [("f", value) for value in calls]


@given(PLAIN, st.lists(ARGUMENTS, max_size=2))
def test_functiongemma(content: str, calls: list[dict[str, Any]]) -> None:
    begin, end = "<start_function_call>call:f", "<end_function_call>"
    text = content + "".join(begin + literal(value) + end for value in calls)
    text = text.replace(QUOTE, "<escape>")
    found = Output("functiongemma").check_law(text, every_cut=False)
    assert (found.content, loaded(found)) == (content, [("f", value) for value in calls])


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("call:f{a:1}", {"a": 1}), ("f{a:1}", {"a": 1}), ("call:f(a:1)", {"a": 1}),
        ("call:f{a:1", {"a": 1}), ("call:f", {}), ('call:f(a:<|"|>)<|"|>)', {"a": ")"}),
        ("call: f {a: 1, b: plain text}", {"a": 1, "b": "plain text"}),
    ],
)  # fmt: skip
def test_what_models_leave_out(body: str, value: Any) -> None:
    assert loaded(GEMMA.check_law(f"<|tool_call>{body}<tool_call|>")) == [("f", value)]


@pytest.mark.parametrize(
    "body", ["call:f{a}", "call:f{a:}", "{a:1}", "call:f{a:[1}", "call:f{a:" + "[" * 99 + "}"]
)
def test_what_is_no_call_is_content(body: str) -> None:
    text = f"x<|tool_call>{body}<tool_call|>"
    assert GEMMA.check_law(text) == Parsed(text)
