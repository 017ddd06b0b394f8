# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tags between markers."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, PLAIN, Output, Parsed, loaded

TOOLS = {"f": {"properties": {"s": {"type": "string"}, "i": {"type": "integer"}}}}
STEP3 = Output("step3", tools=TOOLS)
BEGIN, SEP, END = "<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>"
SECTION, SECTION_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
ARGUMENTS = st.fixed_dictionaries({"s": PLAIN, "i": st.integers()})


def render(arguments: dict[str, Any], name: str = "f") -> str:
    tags = "".join(
        f'<steptml:parameter name="{key}">{value}</steptml:parameter>'
        for key, value in arguments.items()
    )
    return f'{BEGIN}function{SEP}<steptml:invoke name="{name}">{tags}</steptml:invoke>{END}'


@given(PLAIN, st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]]) -> None:
    text = content + SECTION + "\n".join(map(render, calls)) + SECTION_END
    found = STEP3.check_law(text, every_cut=False)
    assert found.content == content
    assert loaded(found) == [("f", arguments) for arguments in calls]


@given(NAMES)
def test_names_and_missing_sections(name: str) -> None:
    found = Output("step3", tools={}).check_law(render({}, name), every_cut=False)
    assert found == Parsed("", "", [(name, "{}")])


def test_broken_ones() -> None:
    text = f"{SECTION}{BEGIN}function{SEP}nothing"
    assert STEP3.check_law(text) == Parsed(text)
    cut = f'{BEGIN}function{SEP}<steptml:invoke name="f"><steptml:parameter name="s">ab'
    assert STEP3.parse(cut, complete=False).calls == [("f", '{"s": "ab')]
    assert json.loads(STEP3.parse(cut).calls[0][1]) == {"s": "ab"}
