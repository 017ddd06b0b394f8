# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Messages, as clients write them."""

from typing import Any

import pytest

from llmserve.api.chat_messages import (
    ROLES,
    check_template_kwargs,
    read_messages,
    with_short_ids,
)
from llmserve.errors import RequestError


@pytest.mark.parametrize("role", ROLES)
def test_roles_and_text_parts(role: str) -> None:
    parts: list[Any] = [{"type": "text", "text": "a"}, "b", {"type": "refusal", "refusal": "c"}]
    assert read_messages([{"role": role, "content": parts}]) == [
        {"role": role, "content": "a\nb\nc"}
    ]
    assert read_messages([{"role": role, "content": "x", "made_up": 1, "name": "n"}]) == [
        {"role": role, "content": "x", "name": "n"}
    ]


def test_an_assistant_may_have_said_nothing() -> None:
    messages: list[dict[str, Any]] = [{}, {"content": None, "tool_calls": []}]
    for message in [{"role": "assistant"} | fields for fields in messages]:
        assert read_messages([message]) == [{"role": "assistant", "content": ""}]


def test_a_refusal_is_what_an_assistant_said() -> None:
    said = {"role": "assistant", "content": None, "refusal": "No."}
    assert read_messages([said]) == [{"role": "assistant", "content": "No."}]
    told = said | {"content": "Well.", "refusal": None}
    assert read_messages([told]) == [{"role": "assistant", "content": "Well."}]


def test_parts_of_reasoning_are_an_assistants() -> None:
    content = [
        {"type": "thinking", "thinking": "a"},
        {"type": "text", "text": "x"},
        {"type": "thinking", "thinking": "b", "signature": "s"},
    ]
    [read] = read_messages([{"role": "assistant", "content": content}])
    assert read == {
        "role": "assistant", "content": "x", "reasoning": "a\nb", "reasoning_content": "a\nb"
    }  # fmt: skip
    [read] = read_messages([{"role": "assistant", "content": content, "reasoning": "own"}])
    assert read["reasoning"] == read["reasoning_content"] == "own"
    with pytest.raises(RequestError) as info:
        read_messages([{"role": "user", "content": content}])
    assert info.value.param == "messages[0].content[0].type"


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        (5, "messages[1]", "invalid_type"),
        ({"content": "x"}, "messages[1].role", "missing_required_parameter"),
        ({"role": 5, "content": "x"}, "messages[1].role", "invalid_type"),
        ({"role": "robot", "content": "x"}, "messages[1].role", "invalid_value"),
        ({"role": "user"}, "messages[1].content", "missing_required_parameter"),
        ({"role": "user", "content": 5}, "messages[1].content", "invalid_type"),
        ({"role": "user", "content": [5]}, "messages[1].content[0]", "invalid_type"),
        (
            {"role": "user", "content": [{}]},
            "messages[1].content[0].type",
            "missing_required_parameter",
        ),
        ({"role": "user", "content": [{"type": 5}]}, "messages[1].content[0].type", "invalid_type"),
        (
            {"role": "user", "content": ["a", {"type": "input_audio"}]},
            "messages[1].content[1].type",
            "unsupported_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "messages[1].content[0].text",
            "missing_required_parameter",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 5}]},
            "messages[1].content[0].text",
            "invalid_type",
        ),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name", "invalid_type"),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
            "messages[1].function_call",
            "unsupported_parameter",
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_path(message: Any, param: str, code: str) -> None:
    with pytest.raises(RequestError) as info:
        read_messages([{"role": "user", "content": "ok"}, message])
    assert (info.value.param, info.value.code) == (param, code)


def test_template_kwargs_are_any_but_the_templates_own() -> None:
    good = {"enable_thinking": False, "x": 0.5, "none": None, "builtin_tools": ["a"], "c": {"d": 1}}
    assert check_template_kwargs(good) == good
    assert check_template_kwargs(None) == {}
    bad = [{name: 1} for name in ("messages", "tools", "chat_template", "tokenize", "self")]
    for kwargs in bad:
        with pytest.raises(RequestError) as info:
            check_template_kwargs(kwargs)
        assert info.value.param == f"chat_template_kwargs.{next(iter(kwargs))}"


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
    } | fields


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"b": 1, "a": [2]}', {"b": 1, "a": [2]}), ({"b": 1}, {"b": 1}), ("", {}), (None, {}),
        ("{broken", {}), ("[1]", {}), ("null", {}), ("[" * 100_000, {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [None, "", "said", [{"type": "text", "text": "said"}]])
def test_calls_come_back_in_every_form(arguments: Any, wanted: Any, content: Any) -> None:
    message = {"role": "assistant", "content": content, "tool_calls": [call(arguments)]}
    (read,) = read_messages([message])
    assert read["content"] == ("said" if content else "")
    assert read["tool_calls"] == [call(wanted)]
    assert list(read["tool_calls"][0]["function"]["arguments"]) == list(wanted)
    del message["content"]
    assert read_messages([message])[0]["content"] == ""


def test_a_call_may_have_null_for_what_it_does_not_need() -> None:
    message = {"role": "assistant", "tool_calls": [call("{}", id=None, type=None)]}
    assert read_messages([message])[0]["tool_calls"] == [call({}, id="")]


def test_reasoning_comes_back_under_either_name() -> None:
    for name in ("reasoning", "reasoning_content"):
        (read,) = read_messages([{"role": "assistant", "content": "x", name: "hm"}])
        assert read["reasoning"] == read["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("calls", "path", "code"),
    [
        ("x", "", "invalid_type"),
        (0, "", "invalid_type"),
        ({}, "", "invalid_type"),
        (["x"], "[0]", "invalid_type"),
        ([call("{}", type=5)], "[0].type", "invalid_type"),
        ([call("{}", type="custom")], "[0].type", "invalid_value"),
        ([{"id": "1"}], "[0].function", "missing_required_parameter"),
        ([{"function": 1}], "[0].function", "invalid_type"),
        ([{"function": {}}], "[0].function.name", "missing_required_parameter"),
        ([{"function": {"name": 1}}], "[0].function.name", "invalid_type"),
        ([call("{}", id=5)], "[0].id", "invalid_type"),
        ([call(5)], "[0].function.arguments", "invalid_type"),
    ],
)
def test_a_wrong_call_is_named_by_its_path(calls: Any, path: str, code: str) -> None:
    with pytest.raises(RequestError) as info:
        read_messages([{"role": "assistant", "tool_calls": calls}])
    assert (info.value.param, info.value.code) == (f"messages[0].tool_calls{path}", code)


def test_short_ids_fit_and_still_belong_together() -> None:
    messages = read_messages(
        [
            {"role": "assistant", "tool_calls": [call("{}"), call("{}", id="a1B2c3D4e")]},
            {"role": "tool", "tool_call_id": "call_1", "content": "r"},
            {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": "r"},
        ]
    )
    short = with_short_ids(messages, 9)
    ids = [entry["id"] for entry in short[0]["tool_calls"]]
    assert ids == [short[1]["tool_call_id"], short[2]["tool_call_id"]] and ids[1] == "a1B2c3D4e"
    assert len(ids[0]) == 9 and ids[0].isalnum() and ids[0] != ids[1]
    assert messages[0]["tool_calls"][0]["id"] == "call_1"
