# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Harmony."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

HARMONY = Output("openai", "openai_gptoss")
NEXT = "<|start|>assistant"
THINK = f"<|channel|>analysis<|message|>{{}}<|end|>{NEXT}"
TOOL = "<|channel|>commentary to=functions.{}<|message|>{}<|call|>"
CALL = [("f", '{"a": 1}')]


@given(PLAIN, PLAIN, st.tuples(NAMES, OBJECTS), st.booleans())
def test_parse_undoes_render(reasoning: str, content: str, call: Any, first: bool) -> None:
    name, arguments = call[0], json.dumps(call[1])
    to = f" to=functions.{name}"
    head = f"{to}<|channel|>commentary" if first else f"<|channel|>commentary{to} <|constrain|>json"
    text = f"<|channel|>analysis<|message|>{reasoning}<|end|>{NEXT}"
    if content:
        text += f"<|channel|>commentary<|message|>{content}<|end|>{NEXT}"
    text += f"{head}<|message|>{arguments}<|call|>"
    found = HARMONY.check_law(text, every_cut=False)
    assert found == Parsed(content, reasoning, [(name, arguments)])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<|channel|>final<|message|>Hello", Parsed("Hello")),
        ("<|channel|>analysis<|message|>cut of", Parsed("", "cut of")),
        (
            THINK.format("a") + THINK.format("b") + "<|channel|>final<|message|>c<|return|>",
            Parsed("c", "a\n\nb"),
        ),
        ('<|channel|>commentary to=functions.f<|message|>{"a": 1}', Parsed(calls=CALL)),
        (
            '<|channel|>commentary to=f<|constrain|>json<|message|>{"a": 1}<|call|>',
            Parsed(calls=CALL),
        ),
        (" to=functions.f<|channel|>commentary<|message|><|call|>", Parsed(calls=[("f", "{}")])),
        (
            TOOL.format("f", '{"a": 1}') + NEXT + TOOL.format("g", "{}"),
            Parsed(calls=[*CALL, ("g", "{}")]),
        ),
        ("no channel at all", Parsed("no channel at all")),
        ("<|channel|>commentary to=functions.f<|message|>oh no<|call|>", Parsed("oh no")),
        ("<|channel|>final with no message", Parsed("final with no message")),
    ],
)
def test_outputs(text: str, wanted: Parsed) -> None:
    assert HARMONY.check_law(text) == wanted


def test_without_tools_a_call_is_content() -> None:
    text = '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>'
    assert Output(None, "openai_gptoss").check_law(text) == Parsed('{"a": 1}')
