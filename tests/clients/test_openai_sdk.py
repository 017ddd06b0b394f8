# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of OpenAI's own Python client, and the exceptions it makes of refusals."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.clients.conftest import CONTEXT
from tests.helpers.server import Server

HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Was it the first request?"}]},
]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_conversation_goes_on_with_its_own_answers(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "A prompt that no other test has."}]
    messages.append({"role": "user", "content": "Was it the first?"})
    for turn in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=8, temperature=0
        )
        message = answer.choices[0].message
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens or 0
        assert (cached > 0) == (turn > 0)  # the turns before are not computed again
        messages.append(message.to_dict())
        messages.append({"role": "user", "content": "And the last?"})


def test_the_stream_helper_gathers_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 3}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    asked["stop"] = text[len(text) // 2 :]  # the helper raises where an answer ends by length
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None and final.usage == whole.usage
    assert kinds.count("content.done") == 1 and "content.delta" in kinds


def test_usage_of_every_chunk_when_asked(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=6, stream=True,
            extra_body={"ignore_eos": True},
            stream_options=options,
        )
    )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 6
    assert [chunk.choices for chunk in chunks][-1] == []
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, stream=True)
    assert not any(chunk.usage for chunk in plain)


def test_raw_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=CONTEXT, user="me", store=True,
        extra_body={"made_up": 1}, extra_headers={"X-Request-Id": "mine-1"},
    )  # fmt: skip
    answer = raw.parse()
    assert answer._request_id == "mine-1" and answer.id == "chatcmpl-mine-1"
    assert {*raw.headers["x-llmserve-ignored"].split(", ")} == {"user", "store", "made_up"}
    assert answer.usage is not None
    room = CONTEXT - answer.usage.prompt_tokens
    assert raw.headers["x-llmserve-max-tokens"] == str(room)
    assert int(raw.headers["openai-processing-ms"]) >= 0


def test_completions(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["The quick", "brown fox"], "max_tokens": 5}
    whole = client.completions.create(**asked, n=2, logprobs=2, seed=1)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) <= 5
    scored = client.completions.create(
        model="tiny", prompt="The quick brown fox", echo=True, max_tokens=0, logprobs=1
    )
    (choice,) = scored.choices
    assert choice.text == "The quick brown fox" and choice.logprobs is not None
    assert scored.usage is not None
    values = choice.logprobs.token_logprobs or []
    assert len(values) == scored.usage.prompt_tokens and scored.usage.completion_tokens == 0
    best = client.completions.create(**asked, best_of=4, seed=1)
    assert len(best.choices) == 2
    beams = client.completions.create(
        **asked, n=3, extra_body={"use_beam_search": True, "length_penalty": 0.5}
    )
    assert len({choice.text for choice in beams.choices[:3]}) > 1


def test_the_fingerprint_is_one_and_the_same(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    two = client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert one.system_fingerprint == two.system_fingerprint
    assert one.system_fingerprint is not None
    assert one.system_fingerprint.startswith("llmserve-")


def test_many_at_once(server: Server) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny",
                        messages=[{"role": "user", "content": f"number {i % 4}"}],
                        max_tokens=8,
                        temperature=0,
                    )
                    for i in range(16)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(ask())
    assert texts[:4] * 4 == texts


def test_a_stream_that_is_left_early_leaves_nothing_behind(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break


REFUSED: list[tuple[type[openai.APIStatusError], str | None, str, dict[str, Any]]] = [
    (openai.NotFoundError, "model_not_found", "model", {"model": "gone"}),
    (openai.BadRequestError, "decimal_above_max_value", "temperature", {"temperature": 3}),
    (openai.BadRequestError, "invalid_type", "max_tokens", {"max_tokens": "many"}),
    (openai.BadRequestError, "invalid_type", "stop[1]", {"stop": ["x", 1]}),
    (openai.BadRequestError, "missing_required_parameter", "messages", {"messages": None}),
    (openai.BadRequestError, "invalid_type", "messages[0]", {"messages": ["hi"]}),
    (openai.BadRequestError, "integer_above_max_value", "top_logprobs",
     {"logprobs": True, "top_logprobs": 99}),
    (openai.BadRequestError, "context_length_exceeded", "messages",
     {"messages": [{"role": "user", "content": "word " * 999}]}),
    (openai.BadRequestError, "unsupported_parameter", "modalities", {"modalities": ["audio"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "code", "param", "fields"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(
    client: openai.OpenAI,
    kind: type[openai.APIStatusError],
    code: str | None,
    param: str,
    fields: dict[str, Any],
    stream: bool,
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO} | fields
    with pytest.raises(kind) as info:
        client.chat.completions.create(**asked, stream=stream)
    assert type(info.value) is kind
    assert (info.value.code, info.value.param) == (code, param)
    assert info.value.type == "invalid_request_error"
    assert info.value.request_id
