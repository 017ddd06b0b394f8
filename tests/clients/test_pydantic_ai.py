# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of pydantic-ai."""

from collections.abc import AsyncIterator
from typing import Any, cast

import openai
import pytest
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.helpers.server import Server


@pytest.fixture
async def model(server: Server) -> AsyncIterator[OpenAIChatModel]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client))


def agent(model: OpenAIChatModel, **settings: Any) -> Agent:
    return Agent(
        model,
        instructions="Be brief.",
        model_settings=cast(ModelSettings, {"max_tokens": 8} | settings),
    )


async def test_a_conversation(model: OpenAIChatModel) -> None:
    made = agent(model, temperature=0.0)
    first = await made.run("Was it the first?")
    assert isinstance(first.output, str)
    assert 0 < first.usage.output_tokens <= 8
    second = await made.run("And the last?", message_history=first.all_messages())
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.cache_read_tokens > 0


async def test_stream_is_what_run_is(model: OpenAIChatModel) -> None:
    made = agent(model, seed=4)
    whole = await made.run("Was it the first?")
    async with made.run_stream("Was it the first?") as stream:
        assert await stream.get_output() == whole.output
        assert stream.usage.output_tokens == whole.usage.output_tokens


async def test_refusals(model: OpenAIChatModel) -> None:
    with pytest.raises(ModelHTTPError) as info:
        await agent(model).run("word " * 999)
    assert info.value.status_code == 400
    assert isinstance(info.value.body, dict)
    assert info.value.body["code"] == "context_length_exceeded"
