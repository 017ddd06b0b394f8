# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of litellm. Run by others.py, in an environment that has litellm."""

import asyncio
import json
import sys
from typing import Any

import litellm

COMMON: dict[str, Any] = {"api_base": sys.argv[1], "api_key": "none", "max_retries": 0}
MODEL = "hosted_vllm/tiny"
MESSAGES = [{"role": "user", "content": "Was it the first?"}]


def raised(kind: type[Exception], **asked: Any) -> Exception:
    """The exception of a request that is to be refused."""
    try:
        litellm.completion(**(COMMON | {"model": MODEL, "messages": MESSAGES} | asked))
    except kind as error:
        return error
    raise AssertionError(f"{asked} was not refused")


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def is_weather(text: str) -> bool:
    """Whether it is one of the schema's few values."""
    value = json.loads(text)
    return value["city"] in ("Paris", "Rome") and value["days"] in (1, 2)


def use_tools(asked: dict[str, Any]) -> None:
    """Called, streamed, and answered."""
    function = {"name": "weather", "parameters": SCHEMA, "strict": True}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    tools["parallel_tool_calls"] = False
    whole = litellm.completion(**asked, **tools).choices[0]
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and is_weather(call.function.arguments)
    chunks = list(litellm.completion(**asked, **tools, stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message
    assert rebuilt.tool_calls[0].function.arguments == call.function.arguments
    history = [*MESSAGES, whole.message.model_dump()]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    replay = asked | {"messages": history, "max_tokens": 4}
    assert litellm.completion(**replay).usage.completion_tokens <= 4


def use_shapes(asked: dict[str, Any]) -> None:
    """An answer of a given shape."""
    shape = {"name": "weather", "strict": True, "schema": SCHEMA}
    form = {"type": "json_schema", "json_schema": shape}
    made = litellm.completion(**asked, response_format=form)
    assert is_weather(made.choices[0].message.content)


def use_reasoning() -> None:
    """Whole and streamed, within a budget."""
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>"}]
    body = {"add_generation_prompt": False, "continue_final_message": True}
    asked = COMMON | {"api_base": sys.argv[2], "model": MODEL, "messages": messages, "seed": 5}
    asked |= {"max_tokens": 30, "extra_body": body | {"thinking_token_budget": 6}}
    whole = litellm.completion(**asked)
    message = whole.choices[0].message
    assert message.content and message.reasoning_content
    assert whole.usage.completion_tokens_details.reasoning_tokens <= 6 + 8
    chunks = list(litellm.completion(**asked, stream=True))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    assert rebuilt.reasoning_content == message.reasoning_content
    assert rebuilt.content == message.content


def main() -> None:
    """Whole, streamed, asynchronous, embedded in a router; and what refusals become."""
    for provider in ("openai", "hosted_vllm"):
        asked = COMMON | {"model": f"{provider}/tiny", "messages": MESSAGES, "max_tokens": 8}
        whole = litellm.completion(**asked, seed=3)
        assert 0 < whole.usage.completion_tokens <= 8
        assert whole.choices[0].finish_reason in ("stop", "length")
        chunks = list(
            litellm.completion(**asked, seed=3, stream=True, stream_options={"include_usage": True})
        )
        rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert rebuilt.choices[0].message.content == whole.choices[0].message.content
        assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
        text = asyncio.run(litellm.acompletion(**asked, seed=3)).choices[0].message.content
        assert text == whole.choices[0].message.content
        use_tools(COMMON | {"model": f"{provider}/tiny", "messages": MESSAGES, "seed": 1})
        use_shapes(COMMON | {"model": f"{provider}/tiny", "messages": MESSAGES, "seed": 1})
    use_reasoning()
    logprobs = litellm.completion(
        **COMMON, model=MODEL, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert len(logprobs.choices[0].logprobs.content[0].top_logprobs) == 2
    completed = litellm.text_completion(
        **COMMON, model="text-completion-openai/tiny", prompt=["The quick", "brown"], max_tokens=4
    )
    assert [choice.index for choice in completed.choices] == [0, 1]
    router = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": COMMON | {"model": MODEL}}]
    )
    assert router.completion(model="m", messages=MESSAGES, max_tokens=2).choices

    too_long = [{"role": "user", "content": "word " * 999}]
    raised(litellm.ContextWindowExceededError, messages=too_long)
    raised(litellm.BadRequestError, temperature=3)
    raised(litellm.NotFoundError, model="hosted_vllm/gone")
    print("all is well")


main()
