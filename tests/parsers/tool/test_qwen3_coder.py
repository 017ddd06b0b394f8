# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""XML-like calls whose arguments are text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import PLAIN, TEXTS, VALUES, Output, Parsed, loaded

SCHEMA = {
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": ["number", "null"]},
        "b": {"type": "boolean"},
        "o": {"type": "object"},
        "l": {"anyOf": [{"type": "array"}, {"type": "null"}]},
    }
}
QWEN = Output("qwen3_coder", tools={"f": SCHEMA})
ENDS = ("</parameter>", "\n<parameter=", "\n</function>", "\n<function=", "\n</tool_call>")
SAYABLE = TEXTS.filter(lambda text: not any(end in f"\n{text}\n" for end in ENDS))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "s": SAYABLE,
        "unknown": SAYABLE,
        "i": st.integers(-(2**70), 2**70),
        "n": st.none() | st.floats(-1e9, 1e9) | st.integers(),
        "b": st.booleans(),
        "o": st.dictionaries(TEXTS, VALUES, max_size=3),
        "l": st.none() | st.lists(VALUES, max_size=3),
    },
).filter(lambda value: not any(end in json.dumps(value, ensure_ascii=False) for end in ENDS))


def render(content: str, calls: list[dict[str, Any]]) -> str:
    """As the template does."""
    text = content
    for arguments in calls:
        text += ("\n" if text else "") + "<tool_call>\n<function=f>\n"
        for key, value in arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += f"<parameter={key}>\n{shown}\n</parameter>\n"
        text += "</function>\n</tool_call>"
    return text


@given(PLAIN, st.lists(ARGUMENTS, max_size=2))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]]) -> None:
    found = QWEN.check_law(render(content, calls), every_cut=False)
    assert (found.content, loaded(found)) == (content, [("f", value) for value in calls])


ONE = [("f", '{"s": "x"}')]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call><function=f><parameter=s>x</parameter></function></tool_call>",
        "<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nx\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>",
        "<tool_call>\n<function=f>\n<parameter=s>\nx",
    ],
)
def test_tags_may_be_missing(text: str) -> None:
    assert QWEN.check_law(text) == Parsed(calls=ONE)


def test_one_newline_goes_at_each_side() -> None:
    text = "<function=f><parameter=s>\n\n a<b \n\n</parameter></function>"
    assert QWEN.check_law(text) == Parsed(calls=[("f", '{"s": "\\n a<b \\n"}')])


def test_several_functions_in_one_tag_and_no_arguments() -> None:
    text = "<tool_call><function=f></function>\n<function=g>\n</function></tool_call>ok"
    assert QWEN.check_law(text) == Parsed("ok", "", [("f", "{}"), ("g", "{}")])


def test_a_cut_call_stays_cut() -> None:
    text = "<tool_call><function=f><parameter=s>x"
    assert QWEN.parse(text, complete=False) == Parsed(calls=[("f", '{"s": "x')])


def test_strings_stream() -> None:
    parser = QWEN.parser()
    parser.feed("<function=f><parameter=s>a")
    assert [part.text for part in parser.feed('b"')] == ['b\\"']


@pytest.mark.parametrize("text", ["<tool_call>x", "<tool_call><function=f", "<function=\n>"])
def test_no_call_is_content(text: str) -> None:
    assert QWEN.check_law(text) == Parsed(text)


def test_seed_oss_prefixes_its_outer_tag() -> None:
    text = "<seed:think>so</seed:think><seed:tool_call><function=f><parameter=s>x</parameter>"
    text += "</function></seed:tool_call>"
    assert Output("seed_oss", "seed_oss").check_law(text) == Parsed("", "so", ONE)
