# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""DeepSeek's call tokens, with and without a code fence."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

V3, V31 = Output("deepseek_v3", "deepseek_r1", prompt="</think>"), Output("deepseek_v31")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)
SECTION = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"


def render(content: str, calls: list[tuple[str, str]], fence: bool) -> str:
    """As the published template of V3 does, or as that of V3.1."""
    texts = [
        f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        if fence
        else f"{name}<｜tool▁sep｜>{arguments}"
        for name, arguments in calls
    ]
    return content + ("\n" if fence else "").join(CALL[0] + text + CALL[1] for text in texts).join(
        SECTION
    )


@given(PLAIN, CALLS, st.booleans())
def test_parse_undoes_render(content: str, calls: Any, fence: bool) -> None:
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = render(content, wanted, fence)
    found = (V3 if fence else V31).check_law(text, every_cut=False)
    assert found == Parsed(content, "", wanted)


def test_v3_reasons_before_it_calls() -> None:
    text = "so\n</think>\n\n" + render("", [("f", '{"a": 1}')], True)
    reasons = Output("deepseek_v3", "deepseek_r1", prompt="<｜Assistant｜>")
    assert reasons.check_law(text) == Parsed("", "so", [("f", '{"a": 1}')])


@pytest.mark.parametrize("output", [V3, V31])
def test_no_call_is_content(output: Output) -> None:
    for body in ("", CALL[0], CALL[0] + "x", CALL[0] + "f<｜tool▁sep｜>{1}" + CALL[1]):
        assert output.check_law("a" + SECTION[0] + body) == Parsed("a" + SECTION[0] + body)


def test_section_markers_may_be_missing() -> None:
    text = CALL[0] + "f<｜tool▁sep｜>{}" + CALL[1] + CALL[0] + 'g<｜tool▁sep｜>{"a": 1}'
    assert V31.check_law(text) == Parsed(calls=[("f", "{}"), ("g", '{"a": 1}')])
