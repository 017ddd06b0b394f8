# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat chunks in their order."""

import asyncio
from typing import Any

from tests.helpers.api import TOKENIZER, Api, events, open_api


async def chunks(api: Api, **fields: Any) -> list[Any]:
    api.engine.one_by_one = True
    answer = await api.chat(stream=True, **fields)
    *found, done = events(answer.text)
    assert done == "[DONE]"
    return found


async def test_role_then_text_then_finish() -> None:
    async with open_api() as api:
        api.engine.answer = lambda request: "ab"
        first, a, b, last = await chunks(api)
    for chunk in (first, a, b, last):
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == first["id"]
        assert "usage" not in chunk
    choices = [chunk["choices"][0] for chunk in (first, a, b, last)]
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert choices[0] == plain | {"delta": {"role": "assistant", "content": ""}}
    assert choices[1:3] == [plain | {"delta": {"content": text}} for text in "ab"]
    assert choices[3] == plain | {"delta": {}, "finish_reason": "stop", "stop_reason": None}
    assert last["system_fingerprint"] == "llmserve-test-fp"
    assert "system_fingerprint" not in first


async def test_each_of_n_has_one_role_and_one_finish() -> None:
    async with open_api() as api:
        found = await chunks(api, n=3)
    for index in range(3):
        own = [c["choices"][0] for c in found if c["choices"][0]["index"] == index]
        assert [("role" in choice["delta"]) for choice in own] == [True] + [False] * (len(own) - 1)
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        assert "".join(c["delta"].get("content", "") for c in own) == "Hello, world!"


async def test_choices_begin_in_order_whoever_is_first() -> None:
    async with open_api() as api:
        api.engine.hold = True
        asked = asyncio.create_task(chunks(api, n=3))
        while len(api.engine.requests) < 3:
            await asyncio.sleep(0)
        for request in reversed(api.engine.requests):
            api.engine.play(request)
        found = await asked
    roles = [c["choices"][0]["index"] for c in found if "role" in c["choices"][0]["delta"]]
    first = next(c["choices"][0]["index"] for c in found if c["choices"][0]["delta"].get("content"))
    assert roles == [0, 1, 2] and first != 0


async def test_continuous_usage_grows() -> None:
    async with open_api() as api:
        options = {"include_usage": True, "continuous_usage_stats": True}
        *found, last = await chunks(api, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts) and len(set(counts)) > 5
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == counts[-1] == 14
    assert all("system_fingerprint" not in chunk for chunk in found)


async def test_prompt_and_tokens_in_the_chunks() -> None:
    async with open_api() as api:
        first, *rest = await chunks(api, return_token_ids=True, return_prompt_text=True)
    prompt = "<|user|>hi</s><|assistant|>"
    assert first["prompt_text"] == prompt
    assert first["prompt_token_ids"] == TOKENIZER.encode(prompt)
    ids = [token for chunk in rest for token in chunk["choices"][0]["token_ids"]]
    assert ids == [*TOKENIZER.encode("Hello, world!", add_special_tokens=False), 257]
    assert all("prompt_token_ids" not in chunk for chunk in rest)


async def test_echo_comes_before_the_text() -> None:
    messages = [{"role": "assistant", "content": "so: "}]
    body = {"messages": messages, "stream": True, "echo": True}
    body |= {"add_generation_prompt": False, "continue_final_message": True}
    async with open_api() as api:
        found = events((await api.post("/v1/chat/completions", body)).text)[:-1]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in found]
    assert texts[:2] == ["", "so: "] and "".join(texts) == "so: Hello, world!"


async def test_logprobs_of_silent_tokens_are_sent_too() -> None:
    async with open_api() as api:
        api.engine.answer = lambda request: "é"
        found = await chunks(api, logprobs=True)
    sent = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["logprobs"]]
    tokens = [entry["bytes"] for choice in sent for entry in choice["logprobs"]["content"]]
    assert tokens == [[0xC3], [0xA9], list(b"</s>")]


async def test_the_stream_interval_makes_larger_chunks() -> None:
    async with open_api() as api:
        found = await chunks(api, stream_interval=5)
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in found]
    assert texts == ["", "H", "ello,", " worl", "d!"]
