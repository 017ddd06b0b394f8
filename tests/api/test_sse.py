# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Streams equal whole answers however the tokens were cut, and fail in the right place."""

import asyncio
from typing import Any

import pytest

from llmserve.api.errors import INTERNAL_MESSAGE
from llmserve.api.routes.chat.stream import ChatWriter
from llmserve.core.messages import RequestExtra
from llmserve.core.outputs import Delta
from tests.helpers.api import Api, events, open_api

ANSWER = 'Zwölf 🦙 "quoted"\n\u0007 中文 end'


async def streamed(api: Api, path: str, **fields: Any) -> tuple[str, list[Any], list[Any], Any]:
    """Text, logprob entries, token ids and usage of a stream's one choice."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await (api.chat if path == "chat" else api.complete)(**fields, **options)
    assert answer.status_code == 200
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]" and last["choices"] == []
    text, logprobs, ids = "", [], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert "usage" not in chunk
        text += choice["delta"].get("content", "") if path == "chat" else choice["text"]
        logprobs += (choice["logprobs"] or {}).get("content" if path == "chat" else "tokens", [])
        ids += choice.get("token_ids", [])
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    return text, logprobs, ids, last["usage"]


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_joined_deltas_equal_the_whole_answer_at_every_split(path: str) -> None:
    fields: dict[str, Any] = {"return_token_ids": True, "max_tokens": 100}
    fields["logprobs"] = True if path == "chat" else 1
    async with open_api() as api:
        api.engine.answer = lambda request: ANSWER
        whole = (await (api.chat if path == "chat" else api.complete)(**fields)).json()
        choice = whole["choices"][0]
        content = choice["message"]["content"] if path == "chat" else choice["text"]
        assert content == ANSWER
        for step in range(1, len(ANSWER.encode()) + 2):
            for one_by_one in (True, False):
                api.engine.step, api.engine.one_by_one = step, one_by_one
                text, logprobs, ids, usage = await streamed(api, path, **fields)
                assert text == ANSWER
                assert ids == choice["token_ids"]
                assert logprobs == choice["logprobs"]["content" if path == "chat" else "tokens"]
                assert usage == whole["usage"]


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_no_event_has_a_line_end_of_unicode(path: str) -> None:
    """httpx.iter_lines and str.splitlines would cut the JSON there."""
    async with open_api() as api:
        text = "a\u2028b\x85c\u2029d\u20a8"
        api.engine.answer = lambda request: text
        options: dict[str, Any] = {"stream": True, "max_tokens": 100}
        answer = await (api.chat if path == "chat" else api.complete)(**options)
        assert answer.text.splitlines() == answer.text.split("\n")[:-1]
        *chunks, done = events(answer.text)
        joined = [chunk["choices"][0] for chunk in chunks]
        if path == "chat":
            assert "".join(choice["delta"].get("content") or "" for choice in joined) == text
        else:
            assert "".join(choice["text"] for choice in joined) == text


async def test_stream_headers() -> None:
    async with open_api() as api:
        headers = (await api.chat(stream=True, store=True)).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-llmserve-ignored"] == "store"
    assert headers["x-request-id"]


async def test_an_error_before_the_first_token_is_a_status() -> None:
    async with open_api() as api:
        api.engine.fail_at = 0
        api.engine.failure = RequestExtra(
            finish_reason="error", error="server_is_overloaded", message="the queue is full"
        )
        answer = await api.chat(stream=True)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "server_is_overloaded"


async def test_an_error_after_the_first_token_is_one_event_and_no_end_marker() -> None:
    async with open_api() as api:
        api.engine.fail_at, api.engine.one_by_one = 3, True
        answer = await api.chat(stream=True)
    assert answer.status_code == 200
    found = events(answer.text)
    assert [event for event in found if "error" in event] == found[-1:]
    assert found[-1]["error"] == {
        "message": "NaN",
        "type": "server_error",
        "param": None,
        "code": "numerical_error",
    }
    assert len(found) > 2


async def test_a_silent_stream_gets_its_status_and_comments() -> None:
    async with open_api(sse_keep_alive_interval=0.05) as api:
        api.engine.hold = True
        asking = asyncio.ensure_future(api.chat(stream=True))
        await asyncio.sleep(0.2)
        api.engine.release()
        text = (await asking).text
    assert 2 <= text.count(": keep-alive\n\n") <= 4
    assert text.startswith(": keep-alive\n\n") and events(text)[-1] == "[DONE]"


async def test_no_comments_with_the_interval_at_zero() -> None:
    async with open_api(sse_keep_alive_interval=0.0) as api:
        api.engine.delay = 0.02
        assert ": keep-alive" not in (await api.chat(stream=True)).text


async def test_a_bug_in_the_middle_of_a_stream_ends_it_with_a_plain_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = ChatWriter.events

    def events_then_bug(writer: ChatWriter, deltas: list[Delta]) -> bytes:
        if writer._num_begun:
            raise ZeroDivisionError("a secret path")
        return written(writer, deltas)

    monkeypatch.setattr(ChatWriter, "events", events_then_bug)
    async with open_api() as api:
        api.engine.one_by_one = True
        found = events((await api.chat(stream=True)).text)
        assert found[-1]["error"]["message"] == INTERNAL_MESSAGE
        assert "[DONE]" not in found
        assert api.engine.aborted
