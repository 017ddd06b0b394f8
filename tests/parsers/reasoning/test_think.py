# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tags, in the three ways in which reasoning starts."""

import pytest
from hypothesis import given

from llmserve.parsers.registry import REASONING_PARSERS
from llmserve.parsers.tags import TagReasoning
from tests.helpers.parsers import PLAIN, Output, Parsed

NAMES = [
    name for name in REASONING_PARSERS if issubclass(REASONING_PARSERS.load(name), TagReasoning)
]


@pytest.mark.parametrize("name", NAMES)
@given(reasoning=PLAIN, content=PLAIN)
def test_three_starts_give_the_same(name: str, reasoning: str, content: str) -> None:
    parser = REASONING_PARSERS.load(name)
    for opener, closer in zip(parser.opens, parser.closes, strict=True):
        said = f"{opener}\n{reasoning}\n{closer}\n\n{content}"
        wanted = Parsed(content, reasoning)
        closed = Output(None, name, prompt=f"<|assistant|>\n{opener}\n\n{closer}\n\n")
        assert closed.check_law(said, every_cut=False) == wanted  # the model opens it all the same
        assert closed.check_law(content, every_cut=False) == Parsed(content)
        opened = Output(None, name, prompt=f"<|assistant|>\n{opener}\n")
        assert opened.check_law(said, every_cut=False) == wanted  # and here it repeats the opener
        unsaid = said.removeprefix(opener)
        assert opened.check_law(unsaid, every_cut=False) == wanted
        assert opened.check_law(reasoning, every_cut=False) == Parsed("", reasoning)
        if not parser.unopened:
            plain = Output(None, name, prompt="<|assistant|>\n")
            assert plain.check_law(said, every_cut=False) == wanted
            assert plain.check_law(content, every_cut=False) == Parsed(content)


def test_some_models_begin_inside_without_an_opener() -> None:
    output = Output(None, "deepseek_r1", prompt="<|assistant|>")
    assert output.check_law("so\n</think>\n\nyes") == Parsed("yes", "so")


def test_a_continued_message_says_whether_it_is_inside() -> None:
    for prompt, inside in (("<think>hm", True), ("<think>hm</think>Yes", False), ("Yes", False)):
        output = Output(None, "think", prompt=prompt, continued=True)
        wanted = Parsed("b", "a") if inside else Parsed("a</think>b")
        assert output.check_law("a</think>b") == wanted


def test_an_opener_in_a_users_message_is_not_the_models() -> None:
    prompt = "<|user|>what is <think>?<|end|><|assistant|>\n"
    assert Output(None, "think", prompt=prompt).parse("A tag.") == Parsed("A tag.")


def test_closers_that_come_twice_are_dropped() -> None:
    text = "<think>a</think>\n</think>\n\n  b</think>"
    assert Output(None, "think").check_law(text) == Parsed("  b</think>", "a")


def test_a_tool_opener_ends_reasoning() -> None:
    text = '<think>\nso\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert Output("hermes", "think").check_law(text) == Parsed("", "so", [("f", "{}")])
    assert Output(None, "think").check_law("<think>a<tool_call>b") == Parsed("", "a<tool_call>b")
