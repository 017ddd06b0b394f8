# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Messages, as clients write them."""

from typing import Any

import pytest

from llmserve.api.chat_messages import ROLES, check_template_kwargs, read_messages
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
            {"role": "assistant", "content": "x", "tool_calls": [{}]},
            "messages[1].tool_calls",
            "unsupported_parameter",
        ),
    ],
)
def test_a_wrong_message_is_named_by_its_path(message: Any, param: str, code: str) -> None:
    with pytest.raises(RequestError) as info:
        read_messages([{"role": "user", "content": "ok"}, message])
    assert (info.value.param, info.value.code) == (param, code)


def test_template_kwargs_are_small_scalars() -> None:
    good = {"enable_thinking": False, "n": 1, "x": 0.5, "s": "y", "none": None}
    assert check_template_kwargs(good) == good
    assert check_template_kwargs(None) == {}
    bad: list[dict[str, Any]] = [{"a": []}, {"a": {}}, {"a": "x" * 1025}]
    bad += [{name: 1} for name in ("messages", "tools", "chat_template", "tokenize", "self")]
    for kwargs in bad:
        with pytest.raises(RequestError) as info:
            check_template_kwargs(kwargs)
        assert info.value.param == f"chat_template_kwargs.{next(iter(kwargs))}"
