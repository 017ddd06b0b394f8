# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One render for all: what differs is what stands around the objects."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)
FORMATS = {  # around all, around each, between two, the keys
    "phi4_mini_json": ("functools[{}]", "{}", ", ", ("name", "arguments")),
    "internlm": (
        "{}", "<|action_start|><|plugin|>\n{}<|action_end|>", "\n", ("name", "parameters")
    ),
    "jamba": ("<tool_calls>[\n{}\n]</tool_calls>", "{}", ",\n", ("name", "arguments")),
    "granite-20b-fc": ("{}", "<function_call> {}", " ", ("name", "arguments")),
    "cohere_command3": (
        "<|START_ACTION|>[\n    {}\n]<|END_ACTION|>", "{}", ",\n    ", ("tool_name", "parameters")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@given(content=PLAIN, calls=CALLS)
def test_parse_undoes_render(name: str, content: str, calls: Any) -> None:
    whole, each, between, (tool, values) = FORMATS[name]
    bodies = [json.dumps({tool: called, values: arguments}) for called, arguments in calls]
    text = content + whole.replace("{}", between.join(each.replace("{}", b) for b in bodies))
    wanted = [(called, json.dumps(arguments)) for called, arguments in calls]
    assert Output(name).check_law(text, every_cut=False) == Parsed(content, "", wanted)


CALL = [("f", '{"a": "]"}')]
LAW = [
    ("phi4_mini_json", 'x functools[{"name": "f", "arguments": {"a": "]"}}]y', "x y", CALL),
    ("phi4_mini_json", "import functools[0]", "import functools[0]", []),
    ("internlm", '<|action_start|><|plugin|>{"name": "f", "parameters": {"a": "]"}}', "", CALL),
    ("jamba", '<tool_calls>[{"name": "f", "arguments": {"a": "]"}}', "", CALL),
    ("jamba", "<tool_calls>[1]</tool_calls>", "<tool_calls>[1]</tool_calls>", []),
    ("granite-20b-fc", '<function_call>{"name": "f", "arguments": {"a": "]"}}', "", CALL),
    (
        "cohere_command3",
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "f", "parameters": {"a": "]"}}]',
        "",
        CALL,
    ),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), LAW)
def test_law(name: str, text: str, content: str, calls: Any) -> None:
    assert Output(name).check_law(text) == Parsed(content, "", calls)
