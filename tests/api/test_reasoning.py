# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Effort, in a template's words; and the fields that it and budgets come from."""

from typing import Any

import pytest

from llmserve.api.reasoning import Thinking, read_thinking, thinking_kwargs
from llmserve.errors import RequestError

ALL = frozenset({"reasoning_effort", "enable_thinking", "thinking", "messages"})


def _kwargs(effort: str | None, given: Any, variables: Any, efforts: Any) -> dict[str, Any]:
    thinking = read_thinking(effort, None, True, None, None)
    return thinking_kwargs(thinking, given, variables, efforts)


def test_only_what_the_template_reads_is_set() -> None:
    assert _kwargs(None, {}, ALL, None) == {}
    assert _kwargs("high", {}, frozenset(), None) == {}
    assert _kwargs("none", {}, frozenset({"enable_thinking"}), None) == {"enable_thinking": False}
    assert _kwargs("low", {}, ALL, None) == {
        "reasoning_effort": "low",
        "enable_thinking": True,
        "thinking": True,
    }


def test_what_the_client_says_itself_stays() -> None:
    assert _kwargs("high", {"enable_thinking": False}, ALL, None) == {
        "reasoning_effort": "high",
        "thinking": True,
    }


def test_levels_of_a_model_that_has_its_own() -> None:
    levels = ("low", "medium", "high")
    assert _kwargs("low", {}, ALL, levels)["reasoning_effort"] == "low"
    with pytest.raises(RequestError) as info:
        _kwargs("none", {}, ALL, levels)
    assert (info.value.param, info.value.code) == ("reasoning_effort", "unsupported_value")


def test_budgets_reach_templates_that_read_them() -> None:
    thinking = read_thinking(None, 77, True, None, None)
    assert thinking_kwargs(thinking, {}, ALL, None) == {}
    assert thinking_kwargs(thinking, {}, frozenset({"thinking_budget"}), None) == {
        "thinking_budget": 77
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((None, None, True, None, None), (None, None, None, True)),
        (("low", 5, False, None, None), ("low", True, 5, False)),
        (("none", -1, True, None, None), ("none", False, None, True)),
        ((None, None, True, {"effort": "high"}, None), ("high", True, None, True)),
        ((None, None, True, {"enabled": False}, None), (None, False, None, True)),
        ((None, None, True, {"max_tokens": 9, "exclude": True}, None), (None, None, 9, False)),
        (("low", 5, True, {"effort": "high", "max_tokens": 9}, None), ("low", True, 5, True)),
        ((None, None, True, None, {"type": "disabled"}), (None, False, None, True)),
        ((None, None, True, None, {"type": "enabled", "budget_tokens": 7}), (None, True, 7, True)),
        ((None, 3, True, None, {"type": "adaptive", "budget_tokens": 7}), (None, True, 3, True)),
    ],
)
def test_the_words_of_others(given: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert read_thinking(*given)[:4] == wanted


def test_a_budget_is_named_after_its_field() -> None:
    assert Thinking(None, None, 1, True).param == "thinking_token_budget"
    assert read_thinking(None, None, True, {"max_tokens": 9}, None).param == "reasoning.max_tokens"


@pytest.mark.parametrize(
    ("reasoning", "thinking", "param"),
    [
        ("high", None, "reasoning"),
        ({"effort": "utmost"}, None, "reasoning.effort"),
        ({"effort": 3}, None, "reasoning.effort"),
        ({"enabled": 1}, None, "reasoning.enabled"),
        ({"max_tokens": True}, None, "reasoning.max_tokens"),
        ({"max_tokens": -2}, None, "reasoning.max_tokens"),
        ({"max_tokens": 1 << 31}, None, "reasoning.max_tokens"),
        (None, {"type": "on"}, "thinking.type"),
        (None, {"type": "enabled", "budget_tokens": 1.5}, "thinking.budget_tokens"),
    ],
)
def test_what_is_wrong_is_named(reasoning: Any, thinking: Any, param: str) -> None:
    with pytest.raises(RequestError) as info:
        read_thinking(None, None, True, reasoning, thinking)
    assert info.value.param == param
