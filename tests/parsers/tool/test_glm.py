# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Keys and values in tags."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.parsers import PLAIN, TEXTS, Output, Parsed, loaded

GLM = Output("glm45", "think", tools={"f": {"properties": {"i": {"type": "integer"}}}})
ENDS = ("</arg_value>", "\n<arg_key>", "\n</tool_call>")
SAYABLE = TEXTS.filter(lambda text: not any(end in text for end in ENDS))
ARGUMENTS = st.fixed_dictionaries({}, optional={"s": SAYABLE, "i": st.integers()})


def render(calls: list[dict[str, Any]], gap: str, separator: str = "") -> str:
    """As the template of 4.5 (with newlines) or 4.7 does."""
    text = ""
    for arguments in calls:
        text += f"{gap}<tool_call>f{separator}{gap}"
        for key, value in arguments.items():
            text += f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}"
        text += "</tool_call>"
    return text


@given(PLAIN, st.lists(ARGUMENTS, max_size=2), st.sampled_from(["", "\n"]))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]], gap: str) -> None:
    text = f"<think>so</think>\n{content}{render(calls, gap)}"
    found = GLM.check_law(text, every_cut=False)
    assert found[:2] == (content, "so")
    assert loaded(found) == [("f", value) for value in calls]


@pytest.mark.parametrize("gap", ["", "\n"])
def test_no_arguments(gap: str) -> None:
    assert GLM.check_law(f"<tool_call>f{gap}</tool_call>") == Parsed(calls=[("f", "{}")])


def test_much_whitespace_between_tags() -> None:
    """A grammar allows it."""
    for gap in (" \n" * 20, "\n" * 5_000):
        arguments = f"<arg_key>s</arg_key>{gap}<arg_value>x</arg_value>{gap}"
        text = f"<tool_call>f\n{arguments}</tool_call>"
        assert GLM.check_law(text, every_cut=False) == Parsed(calls=[("f", '{"s": "x"}')])


def test_a_key_without_a_value_is_content_behind_the_call() -> None:
    text = "<tool_call>f\n<arg_key>s</arg_key>so\n<arg_key>i</arg_key><arg_value>1</arg_value>\n"
    found = GLM.check_law(text + "</tool_call>")
    assert found == Parsed("<arg_key>s</arg_key>so\n\n", calls=[("f", '{"i": 1}')])


def test_missing_closers() -> None:
    text = "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x\n<arg_key>i</arg_key>\n<arg_value>1"
    assert GLM.check_law(text) == Parsed(calls=[("f", '{"s": "x", "i": 1}')])


def test_no_call_is_content() -> None:
    for text in ("<tool_call>", "<tool_call>two words</tool_call>", '<tool_call>{"name": "f"}'):
        assert GLM.check_law(text) == Parsed(text)


def test_reasoning_between_calls() -> None:
    text = "<think>a</think><tool_call>f</tool_call>\n<think>b</think>\n<tool_call>g</tool_call>"
    assert GLM.check_law(text) == Parsed("", "a\n\nb", [("f", "{}"), ("g", "{}")])


@given(PLAIN, st.lists(ARGUMENTS, min_size=1, max_size=2), st.sampled_from(["", "\n"]))
@example("", [{"s": "]<]minimax[>[<tool_call>f"}], "")
def test_hunyuan_has_a_separator_and_tags_around_all(
    content: str, calls: list[dict[str, Any]], gap: str
) -> None:
    body = render(calls, gap, "<tool_sep>")
    text = f"<think>so</think>{content}<tool_calls>{body}{gap}</tool_calls>"
    hunyuan = GLM._replace(tool="hy_v3")
    found = hunyuan.check_law(text, every_cut=False)
    assert found[:2] == (content, "so")
    assert loaded(found) == [("f", value) for value in calls]


def test_hunyuan_at_every_cut() -> None:
    hunyuan = Output("hy_v3")
    text = (
        "hi<tool_calls>\n<tool_call>f<tool_sep>\n<arg_key>s</arg_key>\n<arg_value>x</arg_value>\n"
    )
    text += "</tool_call>\n<tool_call>g<tool_sep></tool_call>\n</tool_calls>"
    assert hunyuan.check_law(text) == Parsed("hi", "", [("f", '{"s": "x"}'), ("g", "{}")])
    for text in ("<tool_calls>", "<tool_calls>x", "<tool_calls><tool_call>two words<tool_sep>"):
        assert hunyuan.check_law(text) == Parsed(text)
