# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""DSML."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import OBJECTS, PLAIN, TEXTS, Output, Parsed, loaded

DSML = Output("deepseek_v32")
ENDS = ("</｜DSML｜", "\n<｜DSML｜")
SAYABLE = TEXTS.filter(lambda text: not any(end in text for end in ENDS))
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={"s": SAYABLE, "o": OBJECTS, "i": st.integers() | st.none() | st.booleans()},
).filter(lambda value: not any(end in json.dumps(value, ensure_ascii=False) for end in ENDS))


def render(content: str, calls: list[dict[str, Any]], outer: str, space: str = "") -> str:
    """As the encoding does; `space` stands behind the bars."""
    begin, end = f"<｜DSML｜{space}", f"</｜DSML｜{space}"
    text = f"{content}\n\n{begin}{outer}>\n"
    for arguments in calls:
        text += f'{begin}invoke name="f">\n'
        for key, value in arguments.items():
            plain = isinstance(value, str)
            shown = value if plain else json.dumps(value)
            mark = "true" if plain else "false"
            text += f'{begin}parameter name="{key}" string="{mark}">{shown}{end}parameter>\n'
        text += f"{end}invoke>\n"
    return f"{text}{end}{outer}>"


@given(
    PLAIN.filter(bool),
    st.lists(ARGUMENTS, min_size=1, max_size=2),
    st.sampled_from(["function_calls", "tool_calls", "toolcalls", "tool"]),
)
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]], outer: str) -> None:
    found = DSML.check_law(render(content, calls, outer), every_cut=False)
    assert (found.content, loaded(found)) == (content, [("f", value) for value in calls])


@given(PLAIN.filter(bool), st.lists(ARGUMENTS, min_size=1, max_size=2))
def test_spaces_after_the_bars(content: str, calls: list[dict[str, Any]]) -> None:
    text = render(content, calls, "calls", " ")
    found = Output("deepseek_v41").check_law(text, every_cut=False)
    assert (found.content, loaded(found)) == (content, [("f", value) for value in calls])


@pytest.mark.parametrize(
    ("attribute", "text", "value"),
    [
        (' string="true"', "5", "5"),
        (' string="false"', "5", 5),
        ("", "[1]", [1]),
        ("", "plain", "plain"),
        (' string="false"', "plain", "plain"),
    ],
)
def test_the_attribute_says_what_the_text_is(attribute: str, text: str, value: Any) -> None:
    call = f'<｜DSML｜invoke name="f"><｜DSML｜parameter name="a"{attribute}>{text}'
    call += "</｜DSML｜parameter>"
    assert loaded(DSML.check_law(call)) == [("f", {"a": value})]


def test_an_argument_may_end_at_the_next() -> None:
    call = '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x\n'
    call += '<｜DSML｜parameter name="b" string="false">1\n</｜DSML｜invoke>'
    assert DSML.check_law(call) == Parsed(calls=[("f", '{"a": "x", "b": 1}')])
