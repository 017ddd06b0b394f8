# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Reasoning and calls put together."""

import pytest

from llmserve.parsers.base import OutputParser
from tests.helpers.parsers import Output, Parsed


def test_without_formats_everything_is_content() -> None:
    parser = OutputParser(None, None)
    assert [part.text for part in parser.feed(" <think> ")] == [" <think> "]
    assert parser.finish(True) == []


def test_reasoning_then_content_then_calls() -> None:
    output = Output("hermes", "think", prompt="<think>\n")
    text = 'a\n</think>\n\nb\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert output.check_law(text) == Parsed("b", "a", [("f", "{}")])
    parser = output.parser()
    states = [(parser.feed(char), parser.in_reasoning)[1] for char in text]
    assert states.count(True) == text.index(">") and states[0]
    assert parser.num_calls == 1


@pytest.mark.parametrize("complete", [True, False])
def test_white_space_alone_is_content_unless_calls_follow(complete: bool) -> None:
    assert Output("hermes").parse("\n\n", complete=complete) == Parsed("\n\n")
    assert Output("hermes").parse("\n\n<tool_call>", '{"name": "f"}') == Parsed(calls=[("f", "{}")])
