# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Answers of a given shape, as each client asks for them. The model is random: only the grammar
makes its answers right, and fields have few values so that they end."""

from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.helpers.server import Server


class Weather(BaseModel):
    """What it is like."""

    sky: Literal["clear", "cloudy"]
    windy: bool
    where: list[Literal["north", "south"]]


ASK = [{"role": "user", "content": "What is the weather?"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_parse(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 1}
    made = client.chat.completions.parse(**asked, n=3, response_format=Weather)
    assert all(isinstance(choice.message.parsed, Weather) for choice in made.choices)
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == made.choices[0].message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked, max_tokens=2, response_format=Weather)


def test_openai_refusal_points_at_the_keyword(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strange"}}}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "strict": True, "schema": schema},
    }
    with pytest.raises(openai.BadRequestError, match="/properties/a/type") as info:
        client.chat.completions.create(model="tiny", messages=ASK, response_format=form)
    assert info.value.param == "response_format"


def test_choices_of_vllm(client: openai.OpenAI) -> None:
    for extra in (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_choice": ["yes", "no"]},
    ):
        answer = client.completions.create(model="tiny", prompt="Is it?", n=4, extra_body=extra)
        assert {choice.text for choice in answer.choices} <= {"yes", "no"}
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_beam_search_has_no_grammar(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="beam search"):
        client.completions.create(
            model="tiny", prompt="Is it?",
            extra_body={"use_beam_search": True, "guided_choice": ["yes", "no"]},
        )  # fmt: skip


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_langchain(server: Server, method: Literal["json_schema", "json_mode"]) -> None:
    with httpx.Client() as http:
        model = ChatOpenAI(
            model="tiny", base_url=f"{server.url}/v1", api_key="none", http_client=http,  # type: ignore[arg-type]
            max_retries=0, seed=1,
        )  # fmt: skip
        if method == "json_schema":
            assert isinstance(model.with_structured_output(Weather).invoke("Now"), Weather)
        else:
            made = model.bind(max_tokens=40).with_structured_output(method=method, include_raw=True)
            assert made.invoke("As JSON")["raw"].content.lstrip().startswith("{")


async def test_pydantic_ai(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        agent = Agent(
            OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client)),
            output_type=NativeOutput(Weather),
            model_settings=ModelSettings(seed=1),
        )
        assert isinstance((await agent.run("Now")).output, Weather)
        async with agent.run_stream("Now") as stream:
            assert isinstance(await stream.get_output(), Weather)
