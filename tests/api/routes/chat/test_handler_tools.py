# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tools and reasoning over HTTP: whole and streamed answers are the same."""

import json
from typing import Any

import pytest

from llmserve.errors import ConfigError
from llmserve.frontend.tokenizer import Tokenizer
from tests.helpers.api import MODEL, TOKENIZER, Api, events, open_api

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function | tojson }}{% endfor %}</tools>"
    "{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.name }}:{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}={{ m.tool_call_id }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n"
    "{% elif enable_thinking is defined %}<think></think>{% endif %}{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": "f"}},
    {"type": "function", "function": {"name": "g"}},
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
OUTPUTS = [
    "",
    " ",
    "Hello.",
    CALL,
    f"\n\n{CALL}",
    f"Let me.\n{CALL}\n{OTHER}",
    f"{CALL}{OTHER} after",
    "<think>\nhm\n</think>\n\nHello.",
    f"<think>hm</think>{CALL}",
    f"<think>hm {CALL}",
    "<think>never ends",
    "<think></think>",
    "</think>x",
    "<tool_call>broken</tool_call> x",
    '<tool_call>{"name": "f", "arguments": {"a": ',
    '<tool_call>{"name": "f", "arguments": {"a": 1 <</tool_call>',
    '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
    "a <tool b <think> c",
    f"{CALL}\n<think>more</think>\n{OTHER}",
    "日本語 <think>",
]


async def whole(api: Api, **fields: Any) -> dict[str, Any]:
    answer = await api.chat(**fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return summary(body["choices"][0]["message"], body["choices"][0], body["usage"])


async def streamed(api: Api, **fields: Any) -> dict[str, Any]:
    """The same of a stream, put together as SDKs do; asserts what they rely on."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events((await api.chat(**fields, **options)).text)
    assert done == "[DONE]"
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    for number, chunk in enumerate(chunks):
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        assert ("role" in delta) == (number == 0)
        for name in ("content", "reasoning", "reasoning_content"):
            if number and name in delta:
                assert delta[name] or "token_ids" in choice or choice["logprobs"]
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if call["index"] == len(message["tool_calls"]):
                assert set(call) == {"index", "id", "type", "function"}
                assert function["name"] and call["type"] == "function"
                message["tool_calls"].append(call)
            else:
                assert call["index"] == len(message["tool_calls"]) - 1
                assert set(call) == {"index", "function"} and set(function) == {"arguments"}
                message["tool_calls"][-1]["function"]["arguments"] += function["arguments"]
        assert (choice["finish_reason"] is not None) == (number == len(chunks) - 1)
    return summary(message, chunks[-1]["choices"][0], usage["usage"])


def summary(message: dict[str, Any], choice: dict[str, Any], usage: Any) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["id"].startswith("call_") and len(call["id"]) == 29 for call in calls)
    return {
        "content": message["content"] or None,
        "reasoning": message.get("reasoning"),
        "reasoning_content": message.get("reasoning_content"),
        "calls": [(call["function"]["name"], call["function"]["arguments"]) for call in calls],
        "finish": (choice["finish_reason"], choice["stop_reason"]),
        "usage": usage,
    }


@pytest.mark.parametrize("text", OUTPUTS)
@pytest.mark.parametrize("fields", [{"tools": TOOLS}, {}, {"tools": TOOLS, "stop": ["after", "e"]}])
async def test_a_stream_is_the_whole_answer_however_it_is_cut(text: str, fields: Any) -> None:
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: text
        api.engine.one_by_one = True
        wanted = await whole(api, **fields)
        for step in (1, 2, 3, 5, 1000):
            api.engine.step = step
            assert await streamed(api, **fields) == wanted
            assert await whole(api, **fields) == wanted
        api.engine.step = 1
        assert await streamed(api, **fields, stream_interval=4) == wanted


@pytest.mark.parametrize("limit", [1, 14, 30, 45, 52])
async def test_a_cut_answer_is_cut_the_same(limit: int) -> None:
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: f"<think>hm</think>{CALL}"
        wanted = await whole(api, tools=TOOLS, max_tokens=limit)
        assert wanted["finish"] == ("length", None)
        assert await streamed(api, tools=TOOLS, max_tokens=limit) == wanted


async def ask(api: Api, text: str, **fields: Any) -> dict[str, Any]:
    api.engine.answer = lambda request: text
    answer = await api.chat(**fields)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


BAD = {"type": "object", "properties": {"a": {"type": "nope"}}}


@pytest.mark.parametrize(
    ("fields", "second", "where"),
    [
        ({}, {"parameters": BAD, "strict": True}, "#/properties/a/type"),
        ({"tool_choice": "required"}, {"parameters": BAD}, "#/properties/a/type"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, {"parameters": BAD},
         "#/properties/a/type"),
        ({"response_format": {"type": "json_object"}}, {"parameters": BAD}, "#/properties/a/type"),
        ({}, {"parameters": {"properties": {"a": {"uniqueItems": True}}}, "strict": True},
         "#/properties/a/uniqueItems"),
    ],
)  # fmt: skip
async def test_parameters_that_cannot_be_enforced_are_named(
    fields: Any, second: Any, where: str
) -> None:
    tools = [TOOLS[0], {"type": "function", "function": {"name": "g"} | second}]
    async with open_api(template=TEMPLATE) as api:
        answer = await api.chat(tools=tools, **fields)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "tools[1].function.parameters"
        assert error["code"] == "invalid_function_parameters" and where in error["message"]
        one = {"type": "function", "function": {"name": "f"}}  # what may not be called is not bound
        answer = await api.chat(tools=tools, tool_choice=one)
        assert answer.status_code == 200, answer.text


async def test_a_wrong_format_beside_good_tools_is_itself_named() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD}}
    async with open_api(template=TEMPLATE) as api:
        answer = await api.chat(tools=TOOLS, response_format=form)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "response_format"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regex": ""}, "it must not be empty"),
        ({"choice": []}, "choice must be an array of one or more texts"),
        ({"json_object": False}, "json_object must be true, or absent"),
    ],
)
async def test_a_shape_beside_tools_is_refused_as_it_is_alone(asked: Any, said: str) -> None:
    async with open_api(template=TEMPLATE) as api:
        for tools in ({}, {"tools": TOOLS}):
            answer = await api.chat(structured_outputs=asked, **tools)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == "structured_outputs" and said in error["message"]


async def test_what_the_template_does_not_read_is_named() -> None:
    async with open_api(template=TEMPLATE) as api:
        answer = await api.chat(chat_template_kwargs={"enable_thinking": True, "mood": [1]})
        assert answer.headers["x-llmserve-ignored"] == "chat_template_kwargs.mood"
        answer = await api.chat(reasoning={"effort": "high"})
        assert "x-llmserve-ignored" not in answer.headers
    async with open_api() as api:
        answer = await api.chat(reasoning={"effort": "high"}, thinking={"type": "enabled"})
        assert answer.headers["x-llmserve-ignored"] == "reasoning, thinking"
        answer = await api.chat(reasoning={"exclude": True})
        assert "x-llmserve-ignored" not in answer.headers


async def test_the_shape_of_calls() -> None:
    async with open_api(template=TEMPLATE) as api:
        choice = await ask(api, f"\n{CALL}{OTHER}", tools=TOOLS)
        message = choice["message"]
        assert (choice["finish_reason"], message["content"]) == ("tool_calls", None)
        assert [call["function"] for call in message["tool_calls"]] == [
            {"name": "f", "arguments": '{"a": "é"}'},
            {"name": "g", "arguments": "{}"},
        ]
        plain = await ask(api, "Hello.", tools=TOOLS)
        assert "tool_calls" not in plain["message"] and plain["finish_reason"] == "stop"


async def test_what_a_tool_parser_read_is_counted() -> None:
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: f"text{CALL}{OTHER}"
        for fields in ({"tools": TOOLS}, {}, {"tools": TOOLS, "tool_choice": "none"}):
            await whole(api, **fields)
            await streamed(api, **fields)
        await api.chat(tools=TOOLS, n=3)
        api.engine.answer = lambda request: "text"
        await api.chat(tools=TOOLS, n=2, stream=True)
        assert api.state.stats is not None
        assert api.state.stats.tool_parses == {
            ("non_streaming", "no_tool_call"): 0, ("non_streaming", "tool_call"): 4,
            ("streaming", "no_tool_call"): 2, ("streaming", "tool_call"): 1,
        }  # fmt: skip


async def test_tools_go_through_the_template_and_keep_their_order() -> None:
    async with open_api(template=TEMPLATE) as api:
        await api.chat(tools=TOOLS)
        prompt = TOKENIZER.decode(api.engine.requests[0].prompt_token_ids.tolist())
        assert "".join(json.dumps(tool["function"]) for tool in TOOLS) in prompt
    async with open_api() as api:
        answer = await api.chat(tools=TOOLS)
        assert answer.headers["x-llmserve-ignored"] == "tools"


async def test_choice_none_and_allowed_tools() -> None:
    async with open_api(template=TEMPLATE) as api:
        none = await ask(api, CALL, tools=TOOLS, tool_choice="none")
        assert (none["message"]["content"], none["finish_reason"]) == (CALL, "stop")
        prompt = TOKENIZER.decode(api.engine.requests[0].prompt_token_ids.tolist())
        assert "<tools>" in prompt
        tools = [{"type": "function", "function": {"name": "g"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}
        some = (await ask(api, CALL + OTHER, tools=TOOLS, tool_choice=choice))["message"]
        assert [call["function"]["name"] for call in some["tool_calls"]] == ["g"]
        assert some["content"] == CALL
        prompts = {tuple(request.prompt_token_ids) for request in api.engine.requests}
        assert len(prompts) == 1


async def test_choice_none_forbids_an_opener_that_is_a_token() -> None:
    """Special or not: Qwen's is none."""
    async with open_api(template=TEMPLATE) as api:
        llm = api.state.llm
        assert llm is not None and llm.tokenizer is not None
        known = {"<tool_call>": 200}
        llm.tokenizer = Tokenizer(llm.tokenizer._backend, {})
        llm.tokenizer.token_id = known.get  # type: ignore[method-assign]
        await api.chat(tools=TOOLS, tool_choice="none", logit_bias={"7": 1})
        await api.chat(tools=TOOLS)
        none, auto = (request.params.logit_bias for request in api.engine.requests)
        assert (none, auto) == ({200: -100.0, 7: 1.0}, {})


async def test_one_call_only() -> None:
    async with open_api(template=TEMPLATE) as api:
        one = await ask(api, CALL + OTHER, tools=TOOLS, parallel_tool_calls=False)
        assert [call["function"]["name"] for call in one["message"]["tool_calls"]] == ["f"]
        found = await streamed(api, tools=TOOLS, parallel_tool_calls=False)
        assert len(found["calls"]) == 1


@pytest.mark.parametrize("name", ["functions", "function_call"])
async def test_the_old_fields_are_refused(name: str) -> None:
    async with open_api() as api:
        error = (await api.chat(**{name: [{"name": "f"}]})).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


async def test_history_gives_the_template_objects() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"b":1,"a":2}'}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "r"}]},
    ]
    async with open_api(template=TEMPLATE) as api:
        answer = await api.post("/v1/chat/completions", {"model": MODEL, "messages": messages})
        assert answer.status_code == 200, answer.text
        prompt = TOKENIZER.decode(api.engine.requests[0].prompt_token_ids.tolist())
    assert '<think>hm</think><tool_call>f:{"b": 1, "a": 2}</tool_call>' in prompt
    assert "<|tool|>r=x" in prompt


@pytest.mark.parametrize(
    ("effort", "end", "text"),
    [
        (None, "<|assistant|>", "<think>\nhm\n</think>\n\nyes"),
        ("high", "<think>\n", "hm\n</think>\n\nyes"),
        ("none", "<think></think>", "yes"),
    ],
)
async def test_reasoning_in_its_three_starts(effort: str | None, end: str, text: str) -> None:
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: text
        body = (await api.chat(reasoning_effort=effort)).json()
        prompt = TOKENIZER.decode(api.engine.requests[0].prompt_token_ids.tolist())
    assert prompt.endswith(end)
    message = body["choices"][0]["message"]
    reasoning = None if effort == "none" else "hm"
    assert (message["content"], message["reasoning"]) == ("yes", reasoning)
    tokens = body["usage"]["completion_tokens_details"]
    if effort == "none":
        assert tokens is None
    else:
        assert len("hm") <= tokens["reasoning_tokens"] <= len("\nhm\n</think>")


async def test_hidden_reasoning_is_billed_and_nowhere_seen() -> None:
    fields: dict[str, Any] = {
        "include_reasoning": False,
        "logprobs": True,
        "return_token_ids": True,
    }
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: "<think>hm</think>yes"
        body = (await api.chat(**fields)).json()
        found = events((await api.chat(**fields, stream=True)).text)[:-1]
    choice = body["choices"][0]
    assert choice["message"]["reasoning"] is None and choice["message"]["content"] == "yes"
    ids = [*TOKENIZER.encode("yes", add_special_tokens=False), 257]
    assert choice["token_ids"][-4:] == ids and TOKENIZER.encode("m")[-1] not in choice["token_ids"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    assert body["usage"]["completion_tokens"] == len("<think>hm</think>yes") + 1
    choices = [chunk["choices"][0] for chunk in found]
    assert not any("reasoning" in piece["delta"] for piece in choices)
    streamed = [token for piece in choices for token in piece.get("token_ids", ())]
    assert streamed == choice["token_ids"]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
async def test_a_flag_narrows_where_reasoning_is(field: str) -> None:
    async with open_api(template=TEMPLATE, reasoning_field=field) as api:
        message = (await ask(api, "<think>hm</think>yes"))["message"]
    assert message[field] == "hm"
    assert not {"reasoning", "reasoning_content"} - {field} & {k for k, v in message.items() if v}


async def test_flags_choose_the_parsers() -> None:
    text = "x<function=f><parameter=a>1</parameter></function>"
    async with open_api(tool_call_parser="qwen3_xml", reasoning_parser="none") as api:
        message = (await ask(api, text, tools=TOOLS))["message"]
        assert message["tool_calls"][0]["function"]["arguments"] == '{"a": "1"}'
    with pytest.raises(ConfigError, match="unknown tool call parser"):
        async with open_api(tool_call_parser="nope"):
            pass


async def test_a_reading_of_n_answers_apart() -> None:
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: CALL
        body = (await api.chat(tools=TOOLS, n=3, seed=1)).json()
        calls = [choice["message"]["tool_calls"][0] for choice in body["choices"]]
        assert len({call["id"] for call in calls}) == 3
        found = events((await api.chat(tools=TOOLS, n=2, stream=True)).text)[:-1]
        ends = [c["choices"][0]["finish_reason"] for c in found if c["choices"][0]["finish_reason"]]
        assert ends == ["tool_calls"] * 2


async def test_mistral_gets_ids_that_its_template_takes() -> None:
    template = TEMPLATE + "{# [TOOL_CALLS] #}"
    async with open_api(template=template) as api:
        api.engine.answer = lambda request: '[TOOL_CALLS]f[ARGS]{"a": 1}'
        (call,) = (await api.chat(tools=TOOLS)).json()["choices"][0]["message"]["tool_calls"]
        assert len(call["id"]) == 9 and call["id"].isalnum()
        messages = [
            {"role": "assistant", "tool_calls": [call | {"id": "call_foreign"}]},
            {"role": "tool", "tool_call_id": "call_foreign", "content": "r"},
        ]
        await api.post("/v1/chat/completions", {"model": MODEL, "messages": messages})
        prompt = TOKENIZER.decode(api.engine.requests[-1].prompt_token_ids.tolist())
    assert "call_foreign" not in prompt and len(prompt.split("=")[1].split("<")[0]) == 9


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_call_is_bound_by_a_grammar(stream: bool) -> None:
    named = {"type": "function", "function": {"name": "f"}}
    async with open_api(template=TEMPLATE) as api:
        api.engine.answer = lambda request: CALL
        summarize = streamed if stream else whole
        required = await summarize(api, tools=TOOLS, tool_choice="required")
        assert (required["content"], required["finish"]) == (None, ("tool_calls", None))
        by_name = await summarize(api, tools=TOOLS, tool_choice=named)
        assert by_name["calls"] == required["calls"] and by_name["finish"] == ("stop", None)
        both, one = [request.params.grammar for request in api.engine.requests]
    assert both is not None and one is not None
    assert {both.kind, one.kind} == {"structural_tag"} and both.param == "tool_choice"
    calls = [json.dumps(f'"name": "{name}"')[1:-1] for name in "fg"]
    assert [call in both.text for call in calls] == [True, True]
    assert [call in one.text for call in calls] == [True, False]
