# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The frame around choices: what a template of bytes must still parse as."""

import json
from typing import Any

import pytest

from llmserve.api.answer import Answer, encode
from llmserve.api.routes.chat.schema import ChatBody
from llmserve.config.server import ServerConfig
from llmserve.core.outputs import Delta
from tests.helpers.api import model_info


class Scoped:
    """As much of a Request and an AsyncLLM as an Answer looks at."""

    scope = {"llmserve.request_id": ("id-1", True)}
    model = model_info()


def answer(body: dict[str, Any], **server: Any) -> Answer:
    return Answer(
        Scoped(),  # type: ignore[arg-type]
        ChatBody.parse(body),
        Scoped(),  # type: ignore[arg-type]
        'm"x',
        ServerConfig(**server),
        prefix="chatcmpl-",
        chunk_kind="chunk",
    )


def parse(data: bytes) -> Any:
    assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
    return json.loads(data[6:])


@pytest.mark.parametrize("finish", [None, "stop"])
@pytest.mark.parametrize("logprobs", [None, {"content": []}])
@pytest.mark.parametrize("token_ids", [True, False])
@pytest.mark.parametrize("usage", [None, {"total_tokens": 1}])
@pytest.mark.parametrize("extra", [None, {"prompt_token_ids": [1]}])
def test_a_chunk_is_json_with_every_option(
    finish: str | None, logprobs: Any, token_ids: bool, usage: Any, extra: Any
) -> None:
    frame = answer({})
    delta = Delta(3, 'é\n"', [7], None, finish, "end" if finish else None)
    inside = b'"text":' + encode(delta.text)
    chunk = parse(
        frame.chunk(
            3, inside, delta, logprobs=logprobs, token_ids=token_ids, usage=usage, extra=extra
        )
    )
    choice = {"index": 3, "text": 'é\n"', "logprobs": logprobs, "finish_reason": finish}
    choice |= {"stop_reason": "end"} if finish else {}
    choice |= {"token_ids": [7]} if token_ids else {}
    expected = {"id": "chatcmpl-id-1", "object": "chunk", "created": frame.created, "model": 'm"x'}
    expected |= {"choices": [choice]} | (extra or {})
    expected |= {"system_fingerprint": "llmserve-test-fp"} if finish else {}
    expected |= {"usage": usage} if usage else {}
    assert chunk == expected


@pytest.mark.parametrize(
    ("options", "forced", "include", "continuous"),
    [
        (None, False, False, False),
        ({}, False, False, False),
        ({"include_usage": True}, False, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, False, True, True),
        ({"continuous_usage_stats": True}, False, False, False),
        (None, True, True, True),
    ],
)
def test_who_gets_usage(options: Any, forced: bool, include: bool, continuous: bool) -> None:
    frame = answer({"stream": True, "stream_options": options}, enable_force_include_usage=forced)
    assert (frame.include_usage, frame.continuous_usage) == (include, continuous)
    event = frame.usage_event({"total_tokens": 5})
    if not include:
        assert event == b""
        return
    assert parse(event)["choices"] == [] and parse(event)["usage"] == {"total_tokens": 5}


def test_a_request_may_only_raise_the_stream_interval() -> None:
    assert answer({"stream_interval": 5}, stream_interval=3).stream_interval == 5
    assert answer({"stream_interval": 2}, stream_interval=3).stream_interval == 3
