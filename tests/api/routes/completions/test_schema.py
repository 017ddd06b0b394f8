# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The completion body by itself; each field's limits are in tests/api/test_fields.py."""

import pytest

from llmserve.api.routes.completions.schema import MAX_PROMPTS, CompletionBody
from llmserve.errors import RequestError


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        (["a"] * MAX_PROMPTS, ["a"] * MAX_PROMPTS),
        ([1] * (MAX_PROMPTS + 1), [[1] * (MAX_PROMPTS + 1)]),
    ],
)
def test_prompts(prompt: object, prompts: list[object]) -> None:
    assert CompletionBody.parse({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([None], "prompt[0]"),
        ([[1], []], "prompt[1]"),
        ([1, [2]], "prompt[1]"),
        ([[1, 2**31]], "prompt[0][1]"),
        (["a"] * (MAX_PROMPTS + 1), "prompt"),
    ],
)
def test_what_is_no_prompt(prompt: object, param: str) -> None:
    with pytest.raises(RequestError) as info:
        _ = CompletionBody.parse({"prompt": prompt}).prompts
    assert info.value.param == param


def test_limit() -> None:
    assert CompletionBody.parse({}).limit == (16, "max_tokens")
    assert CompletionBody.parse({"max_tokens": 0}).limit == (0, "max_tokens")
