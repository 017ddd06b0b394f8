# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Reasoning through the openai SDK: fields, streams, usage, budgets."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.providers.openai import OpenAIProvider

from tests.helpers.server import Server

# The model's template knows nothing of reasoning: an answer that has begun to think goes on with it
THINKING: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.fixture
def client(thinker: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", max_retries=0) as client:
        yield client
    thinker.check_idle()


def _ask(**fields: Any) -> dict[str, Any]:
    extra = THINKING | fields.pop("extra_body", {})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>"}]
    return (
        {"model": "tiny", "messages": messages, "max_tokens": 40, "seed": 5}
        | fields
        | {"extra_body": extra}
    )


# A template of the client's own, which the server trusts, opens it
OPENING = "{% for m in messages %}{{ m.content }}\n{% endfor %}<think>\n"
EXTRA = {"chat_template": OPENING, "thinking_token_budget": 6}


@pytest.mark.parametrize(
    "budget",
    [
        {"thinking_token_budget": 6},
        {"reasoning": {"max_tokens": 6}},
        {"thinking": {"type": "enabled", "budget_tokens": 6}},
    ],
)
def test_a_budget_whole_and_streamed(client: openai.OpenAI, budget: dict[str, Any]) -> None:
    fields = _ask(n=3, extra_body=budget)
    whole = client.chat.completions.create(**fields)
    assert whole.usage and whole.usage.completion_tokens_details
    counted = whole.usage.completion_tokens_details.reasoning_tokens or 0
    assert 18 <= counted <= 3 * (6 + 8)
    stream = client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    reasoning, content, usage = [""] * 3, [""] * 3, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            reasoning[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
            content[choice.index] += choice.delta.content or ""
    for choice in whole.choices:
        assert choice.message.content, "the answer begins"
        assert choice.message.content == content[choice.index]
        assert choice.message.reasoning == reasoning[choice.index]  # type: ignore[attr-defined]
        assert choice.finish_reason == "length"
    assert usage and usage.completion_tokens_details == whole.usage.completion_tokens_details


def test_hidden_reasoning_is_counted(client: openai.OpenAI) -> None:
    fields = _ask(extra_body={"thinking_token_budget": 6, "include_reasoning": False})
    shown = client.chat.completions.create(**_ask(extra_body={"thinking_token_budget": 6}))
    hidden = client.chat.completions.create(**fields)
    assert hidden.choices[0].message.content == shown.choices[0].message.content
    assert hidden.choices[0].message.reasoning is None  # type: ignore[attr-defined]
    assert hidden.usage and shown.usage
    assert hidden.usage.completion_tokens_details == shown.usage.completion_tokens_details


def test_completions_have_budgets(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model="tiny", prompt="hi <think>", max_tokens=40, extra_body={"thinking_token_budget": 4}
    )
    assert "</think>" in made.choices[0].text


async def test_pydantic_ai(thinker: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{thinker.url}/v1", api_key="none") as client:
        agent = Agent(
            OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client)),
            model_settings=OpenAIChatModelSettings(max_tokens=30, seed=5, extra_body=EXTRA),
        )
        run = await agent.run("hi")
        async with agent.run_stream("hi") as stream:
            assert await stream.get_output() == run.output
            streamed: Any = stream.response
    parts: dict[str, Any] = {part.part_kind: part for part in run.response.parts}
    assert set(parts) == {"thinking", "text"}
    assert {part.part_kind: part.content for part in streamed.parts} == {
        kind: part.content for kind, part in parts.items()
    }


def test_langchain(thinker: Server) -> None:
    with httpx.Client() as http:
        model = ChatOpenAI(
            model="tiny", base_url=f"{thinker.url}/v1", api_key="none", http_client=http,  # type: ignore[arg-type]
            max_retries=0, seed=5, max_tokens=30, extra_body=EXTRA, stream_usage=True,  # type: ignore[call-arg]
        )  # fmt: skip
        whole = model.invoke("hi")
        chunks = list(model.stream("hi"))
    assert whole.content and "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert whole.usage_metadata and whole.usage_metadata["output_token_details"]["reasoning"] >= 6
