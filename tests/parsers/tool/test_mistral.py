# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Both of Mistral's forms."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

MISTRAL = Output("mistral", "mistral")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


@given(PLAIN, CALLS)
def test_an_array_of_calls(content: str, calls: Any) -> None:
    entries = [
        {"name": name, "arguments": arguments, "id": "a1b2c3d4e"} for name, arguments in calls
    ]
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = f"{content}[TOOL_CALLS] {json.dumps(entries)}"
    assert MISTRAL.check_law(text, every_cut=False) == Parsed(content, "", wanted)


@given(PLAIN, CALLS, st.sampled_from(["", "[ARGS]", "[CALL_ID]a1b2c3d4e[ARGS]"]))
def test_a_marker_and_a_name_for_each_call(content: str, calls: Any, between: str) -> None:
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = content + "".join(f"[TOOL_CALLS]{name}{between}{text}" for name, text in wanted)
    assert MISTRAL.check_law(text, every_cut=False) == Parsed(content, "", wanted)


@pytest.mark.parametrize("tags", [("[THINK]", "[/THINK]"), ("<think>\n", "\n</think>\n")])
def test_with_reasoning(tags: tuple[str, str]) -> None:
    text = f'{tags[0]}so{tags[1]}[TOOL_CALLS]f[ARGS]{{"a": 1}}'
    assert MISTRAL.check_law(text) == Parsed("", "so", [("f", '{"a": 1}')])


@pytest.mark.parametrize("text", ["[TOOL_CALLS]", "[TOOL_CALLS]f", "[TOOL_CALLS]f[ARGS][1]", "[T"])
def test_no_call_is_content(text: str) -> None:
    assert MISTRAL.check_law(text) == Parsed(text)


def test_an_id_in_the_text_is_kept() -> None:
    (part, _) = MISTRAL.parser().feed("[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{}")
    assert (part.text, part.id) == ("f", "a1b2c3d4e")
