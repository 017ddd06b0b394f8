# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Parts in the fields of messages and deltas."""

import pytest

from llmserve.api.generation import Choice
from llmserve.api.routes.chat.parts import View
from llmserve.core.outputs import Delta, Part

PARTS = [
    Part("reasoning", "a"),
    Part("content", "b"),
    Part("call", "f", 0, "id0"),
    Part("arguments", '{"x"', 0),
    Part("arguments", ": 1}", 0),
    Part("call", "g", 1, "id1"),
]


def view(field: str = "both", include: bool = True, named: bool = False) -> View:
    return View.of(field, include, True, named)


@pytest.mark.parametrize(
    ("field", "include", "names"),
    [
        ("both", True, {"reasoning", "reasoning_content"}),
        ("reasoning", True, {"reasoning"}),
        ("reasoning_content", True, {"reasoning_content"}),
        ("both", False, set()),
    ],
)
def test_the_fields_of_reasoning(field: str, include: bool, names: set[str]) -> None:
    fields = view(field, include).message(Choice(text="b", parts=PARTS[:2]))
    assert fields == {"content": "b"} | dict.fromkeys(names, "a")
    assert view(field, include).delta(Delta(0, "", [], parts=PARTS[:1])) == dict.fromkeys(
        names, "a"
    )


def test_calls_of_a_message() -> None:
    fields = view().message(Choice(text="", parts=PARTS[2:]))
    assert fields["content"] is None
    calls = [(call["id"], call["type"], call["function"]) for call in fields["tool_calls"]]
    assert calls == [
        ("id0", "function", {"name": "f", "arguments": '{"x": 1}'}),
        ("id1", "function", {"name": "g", "arguments": ""}),
    ]


def test_a_chunk_says_id_and_name_once() -> None:
    first = view().delta(Delta(0, "b", [], parts=PARTS[:4]))
    assert first.pop("tool_calls") == [
        {
            "index": 0,
            "id": "id0",
            "type": "function",
            "function": {"name": "f", "arguments": '{"x"'},
        }
    ]
    assert first == {"reasoning": "a", "reasoning_content": "a", "content": "b"}
    second = view().delta(Delta(0, "", [], parts=PARTS[4:]))["tool_calls"]
    assert second[0] == {"index": 0, "function": {"arguments": ": 1}"}}
    assert (second[1]["index"], second[1]["function"]) == (1, {"name": "g", "arguments": ""})


@pytest.mark.parametrize(
    ("reason", "stop", "calls", "named", "wanted"),
    [
        ("stop", None, True, False, "tool_calls"),
        ("stop", 7, True, False, "tool_calls"),
        ("stop", "end", True, False, "stop"),
        ("length", None, True, False, "length"),
        ("stop", None, True, True, "stop"),
        ("stop", None, False, False, "stop"),
        (None, None, True, False, None),
    ],
)
def test_why_it_ended(
    reason: str | None, stop: int | str | None, calls: bool, named: bool, wanted: str | None
) -> None:
    assert view(named=named).finish_reason(reason, stop, calls) == wanted


def test_hidden_tokens() -> None:
    assert view(include=False).shown([1, 2, 3], [True, False, True]) == [2]
    assert view().shown([1, 2], [True, False]) == [1, 2]
    assert view(include=False).shown([1], []) == [1]
