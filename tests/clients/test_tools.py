# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tool calls through each client. The model is random: only the grammar makes it call, and
arguments have few values so that they end."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.helpers.server import Server


class weather(BaseModel):  # noqa: N801 (the name of the tool)
    """What it is like."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]


ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]
NAMED = {"type": "function", "function": {"name": "weather"}}
TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": weather.model_json_schema(), "strict": True},
}
NOTHING = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
OTHER: Any = {
    "type": "function",
    "function": {"name": "time", "parameters": NOTHING, "strict": True},
}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_openai_whole_streamed_and_answered(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": [TOOL], "seed": 1}
    asked |= {"tool_choice": choice, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0]
    [call] = whole.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    weather.model_validate_json(call.function.arguments)
    assert whole.message.content is None
    assert whole.finish_reason == ("stop" if choice is NAMED else "tool_calls")
    ids, arguments = set(), ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0 and delta.function is not None
            ids.add(delta.id) if delta.id else None
            arguments += delta.function.arguments or ""
    assert arguments == call.function.arguments and len(ids) == 1
    replay = [*ASK, whole.message.to_dict()]
    replay.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    answer = client.chat.completions.create(
        model="tiny", messages=replay, tools=[TOOL], max_tokens=4
    )
    assert answer.usage and 0 < answer.usage.completion_tokens <= 4


def test_openai_parses_strict_tools(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(weather)
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": [tool, OTHER], "seed": 1}
    asked["tool_choice"] = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [NAMED]},
    }
    made = client.chat.completions.parse(**asked, max_tokens=200, parallel_tool_calls=False)
    [call] = made.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, weather)
    with client.chat.completions.stream(**asked, parallel_tool_calls=False) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls or []
    assert final[0].function.parsed_arguments == call.function.parsed_arguments


def test_langchain(server: Server) -> None:
    with httpx.Client() as http:
        model = ChatOpenAI(
            model="tiny", base_url=f"{server.url}/v1", api_key="none", http_client=http,  # type: ignore[arg-type]
            max_retries=0, seed=1,
        )  # fmt: skip
        bound = model.bind_tools(
            [weather], tool_choice="required", strict=True, parallel_tool_calls=False
        )
        whole = bound.invoke("Now")
        [call] = whole.tool_calls
        weather.model_validate(call["args"])
        joined: Any = None
        for chunk in bound.stream("Now"):
            assert isinstance(chunk, AIMessageChunk)
            joined = chunk if joined is None else joined + chunk
        assert [c["args"] for c in joined.tool_calls] == [call["args"]]
        history = [HumanMessage("Now"), whole, ToolMessage("sunny", tool_call_id=call["id"])]
        assert model.bind(max_tokens=4).invoke(history).usage_metadata
        by_call = model.with_structured_output(weather, method="function_calling")
        assert isinstance(by_call.invoke("Now"), weather)


async def test_pydantic_ai(server: Server) -> None:
    """Its usual way to an answer of a given type is a tool that has to be called."""
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        agent = Agent(
            OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client)),
            output_type=ToolOutput(weather, name="weather", strict=True),
            model_settings=ModelSettings(seed=1, parallel_tool_calls=False),
        )
        run = await agent.run("Now")
        assert isinstance(run.output, weather)
        async with agent.run_stream("Now") as stream:
            assert await stream.get_output() == run.output
        again = await agent.run("And then?", message_history=run.all_messages())
        assert isinstance(again.output, weather)


def test_who_must_not_call_does_not(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=8
    )
    assert answer.choices[0].message.tool_calls is None


def test_who_must_call_does(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[TOOL, OTHER], tool_choice="required", temperature=1.5,
        n=24, parallel_tool_calls=False, max_tokens=120,
    )  # fmt: skip
    for choice in made.choices:
        [call] = choice.message.tool_calls or []
        if choice.finish_reason == "tool_calls":
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            assert arguments == {} if call.function.name == "time" else weather(**arguments)


def test_reasoning_then_a_shape_or_a_call(thinker: Server) -> None:
    shape: Any = {"name": "verdict", "strict": True, "schema": {"enum": ["yes", "no"]}}
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", max_retries=0) as client:
        made = client.chat.completions.create(
            model="tiny", messages=ASK, tools=[TOOL], n=12, temperature=1.5, max_tokens=150,
            response_format={"type": "json_schema", "json_schema": shape},
            extra_body={"thinking_token_budget": 4},
        )  # fmt: skip
    kinds = set()
    for choice in made.choices:
        if choice.message.tool_calls:
            kinds.add("call")
            call = choice.message.tool_calls[0]
            assert call.type == "function" and call.function.name == "weather"
        elif choice.finish_reason == "stop":
            kinds.add("shape")
            assert json.loads(choice.message.content or "") in ("yes", "no")
    assert kinds <= {"call", "shape"} and kinds
    thinker.check_idle()


def test_calls_in_other_formats_are_forced(thinker: Server) -> None:
    """Reasoning comes first, within its budget; then the call."""
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="-", max_retries=0) as client:
        made = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            tools=[TOOL],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=3,
            extra_body={"thinking_token_budget": 5},
        )
    [call] = made.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["days"] in (1, 2)
    thinker.check_idle()
