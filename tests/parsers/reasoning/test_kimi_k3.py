# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Blocks without tools."""

import pytest

from llmserve.parsers.call_grammar import Thought
from llmserve.parsers.reasoning.kimi_k3 import KimiK3
from tests.helpers.parsers import Output, Parsed

THINK, THINK_END = "<|open|>think<|sep|>", "<|close|>think<|sep|>"
RESPONSE, END = "<|open|>response<|sep|>", "<|close|>response<|sep|><|close|>message<|sep|>"


@pytest.mark.parametrize(
    ("prompt", "text", "wanted"),
    [
        (THINK, f"so{THINK_END}{RESPONSE}hi{END}<|end_of_msg|>", Parsed("hi", "so")),
        (THINK, f"{THINK}so{THINK_END}{RESPONSE}hi", Parsed("hi", "so")),
        (THINK, "so", Parsed("", "so")),
        (THINK, f"so{RESPONSE}hi", Parsed("hi", "so")),
        (RESPONSE, f"hi{END}", Parsed("hi")),
        ("", f"{THINK}so{THINK_END}{RESPONSE}hi{END}", Parsed("hi", "so")),
    ],
)
def test_three_ways_to_begin(prompt: str, text: str, wanted: Parsed) -> None:
    assert Output(None, "kimi_k3", prompt=prompt).check_law(text) == wanted


def test_calls_are_content_where_there_are_no_tools() -> None:
    calls = '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|close|>call<|sep|>'
    found = Output(None, "kimi_k3", prompt=RESPONSE).check_law(calls)
    assert found == Parsed(calls)


def test_what_a_grammar_may_think() -> None:
    assert KimiK3(f"x{THINK}", False).thought == Thought("", THINK_END, RESPONSE)
    assert KimiK3(f"x{RESPONSE}", False).thought is None
    assert KimiK3("x", False).thought == Thought(THINK, THINK_END, RESPONSE)
    assert KimiK3(f"{THINK}so", True).thought == Thought("", THINK_END, RESPONSE)
