# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of langchain-openai."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

from tests.helpers.server import Server

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Was it the first?")]


Chat = Callable[..., ChatOpenAI]


@pytest.fixture
def common(server: Server) -> Iterator[dict[str, Any]]:
    """Fields of every model; the client is closed, which langchain itself never does."""
    with httpx.Client() as client:
        yield {
            "model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0,
            "http_client": client,
        }  # fmt: skip


@pytest.fixture
def chat(common: dict[str, Any]) -> Chat:
    return partial(ChatOpenAI, **common)


def test_invoke(chat: Chat) -> None:
    model = chat(temperature=0, max_tokens=8)
    answer = model.invoke(MESSAGES)
    assert isinstance(answer, AIMessage) and answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 8
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.response_metadata["system_fingerprint"].startswith("llmserve-")
    again = model.invoke([*MESSAGES, answer, HumanMessage("And the last?")])
    assert again.usage_metadata is not None
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0


def test_stream_is_what_invoke_is(chat: Chat) -> None:
    model = chat(seed=5, max_tokens=10, stream_usage=True)
    whole = model.invoke(MESSAGES)
    chunks = list(model.stream(MESSAGES))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert joined.content == whole.content
    assert joined.usage_metadata == whole.usage_metadata


def test_logprobs(chat: Chat) -> None:
    model = chat(logprobs=True, top_logprobs=2, max_tokens=4)
    content = model.invoke(MESSAGES).response_metadata["logprobs"]["content"]
    assert 0 < len(content) <= 4 and all(len(token["top_logprobs"]) == 2 for token in content)


async def test_async(common: dict[str, Any]) -> None:
    async with httpx.AsyncClient() as client:
        model = ChatOpenAI(**common, http_async_client=client, temperature=0, max_tokens=6)  # type: ignore[call-arg]
        text = (await model.ainvoke(MESSAGES)).content
        parts = [chunk.content async for chunk in model.astream(MESSAGES)]
    assert "".join(str(part) for part in parts) == text


def test_a_chain_in_a_batch(chat: Chat) -> None:
    prompt = ChatPromptTemplate.from_messages([("user", "Say {word}")])
    chain = prompt | chat(temperature=0, max_tokens=6) | StrOutputParser()
    words = [{"word": word} for word in ("one", "two", "one")]
    texts = chain.batch(words)
    assert texts[0] == texts[2] and all(isinstance(text, str) for text in texts)


def test_completions(common: dict[str, Any]) -> None:
    model = OpenAI(**common, max_tokens=6, temperature=0)
    assert "".join(model.stream("The quick")) == model.invoke("The quick")
    result = model.generate(["The quick", "brown fox"])
    assert len(result.generations) == 2 and result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] > 0


def test_refusals_are_openai_errors(chat: Chat) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        chat().invoke("word " * 999)
