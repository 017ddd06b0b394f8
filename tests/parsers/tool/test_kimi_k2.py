# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kimi's calls bring their ids."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

KIMI = Output("kimi_k2")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


def render(content: str, calls: list[tuple[str, str]]) -> str:
    """As the template does."""
    body = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{text}"
        "<|tool_call_end|>"
        for index, (name, text) in enumerate(calls)
    )
    return f"{content}<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


@given(PLAIN, CALLS)
def test_parse_undoes_render(content: str, calls: Any) -> None:
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    found = KIMI.check_law(render(content, wanted), every_cut=False)
    assert found == Parsed(content, "", wanted)


@pytest.mark.parametrize(
    ("id", "name"),
    [("functions.f:0", "f"), ("functions.a.b:c:12", "a.b:c"), ("f", "f"), ("f:3", "f")],
)
def test_the_id_is_kept_as_it_is(id: str, name: str) -> None:
    text = f"<|tool_call_begin|>{id}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    parts = KIMI.parser().feed(text)
    assert (parts[0].text, parts[0].id) == (name, id)
    assert KIMI.check_law(text) == Parsed(calls=[(name, "{}")])


def test_no_call_is_content() -> None:
    text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    assert KIMI.check_law(text) == Parsed(text)
