# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The chat body by itself; each field's limits are in tests/api/test_fields.py."""

import pytest

from llmserve.api.routes.chat.schema import ChatBody
from llmserve.errors import RequestError


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": True, "top_logprobs": -1}, -1),
        ({"top_logprobs": 0}, None),
    ],
)
def test_num_logprobs(fields: dict[str, object], expected: int | None) -> None:
    body = ChatBody.parse(fields)
    body.check()
    assert body.num_logprobs == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"n": 2, "temperature": 0}, "n"),
    ],
)
def test_rules_between_fields(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as info:
        ChatBody.parse(fields).check()
    assert info.value.param == param


def test_limit_names_the_field_that_it_came_from() -> None:
    assert ChatBody.parse({}).limit == (None, "max_tokens")
    assert ChatBody.parse({"max_tokens": 3}).limit == (3, "max_tokens")
    both = ChatBody.parse({"max_tokens": 3, "max_completion_tokens": 4})
    assert both.limit == (4, "max_completion_tokens")
