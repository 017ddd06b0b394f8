# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Effort, in a template's words."""

import pytest

from llmserve.api.reasoning import effort_kwargs
from llmserve.errors import RequestError

ALL = frozenset({"reasoning_effort", "enable_thinking", "thinking", "messages"})


def test_only_what_the_template_reads_is_set() -> None:
    assert effort_kwargs(None, {}, ALL, None) == {}
    assert effort_kwargs("high", {}, frozenset(), None) == {}
    assert effort_kwargs("none", {}, frozenset({"enable_thinking"}), None) == {
        "enable_thinking": False
    }
    assert effort_kwargs("low", {}, ALL, None) == {
        "reasoning_effort": "low",
        "enable_thinking": True,
        "thinking": True,
    }


def test_what_the_client_says_itself_stays() -> None:
    assert effort_kwargs("high", {"enable_thinking": False}, ALL, None) == {
        "reasoning_effort": "high",
        "thinking": True,
    }


def test_levels_of_a_model_that_has_its_own() -> None:
    levels = ("low", "medium", "high")
    assert effort_kwargs("low", {}, ALL, levels)["reasoning_effort"] == "low"
    with pytest.raises(RequestError) as info:
        effort_kwargs("none", {}, ALL, levels)
    assert (info.value.param, info.value.code) == ("reasoning_effort", "unsupported_value")
