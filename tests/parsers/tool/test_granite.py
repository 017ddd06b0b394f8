# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""An array without an end marker."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

GRANITE = Output("granite")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


@given(PLAIN, CALLS, st.sampled_from(["<|tool_call|>", "<tool_call>"]))
def test_parse_undoes_render(content: str, calls: Any, marker: str) -> None:
    array = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = content + marker + array
    assert GRANITE.check_law(text, every_cut=False) == Parsed(content, "", wanted)


def test_the_array_ends_at_its_bracket() -> None:
    text = 'a<|tool_call|> [ {"name": "f", "arguments": {"a": "]"}} ]\nb'
    assert GRANITE.check_law(text) == Parsed("a\nb", "", [("f", '{"a": "]"}')])


def test_no_array_is_content() -> None:
    assert GRANITE.check_law("<|tool_call|>[1, 2]") == Parsed("<|tool_call|>[1, 2]")
