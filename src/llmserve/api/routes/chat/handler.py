# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /v1/chat/completions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from llmserve.api.answer import Answer, json_response, written
from llmserve.api.chat_messages import check_template_kwargs, read_messages, with_short_ids
from llmserve.api.fields import read_json
from llmserve.api.generation import Choice, Generation, Pace, num_logprobs, submit
from llmserve.api.logprobs import TokenNames, write
from llmserve.api.openapi import CHAT, MESSAGES, described
from llmserve.api.output_grammar import grammar_for
from llmserve.api.reasoning import Thinking, budget_for, thinking_kwargs
from llmserve.api.routes.chat.parts import View
from llmserve.api.routes.chat.schema import ChatBody
from llmserve.api.routes.chat.stream import ChatWriter
from llmserve.api.sse import EventStream
from llmserve.api.state import AppState, state_of
from llmserve.api.structured import add_ignored
from llmserve.api.tools import ToolUse, read_tools
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.chat_template import ChatTemplate
from llmserve.frontend.parsed_text import Parsing
from llmserve.parsers.base import OutputParser
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)
router = APIRouter()


@router.post(
    "/v1/chat/completions", openapi_extra=described(CHAT, ChatBody, streams=True, messages=MESSAGES)
)
async def create_chat_completion(request: Request) -> Response:
    """A chat answer, whole or streamed."""
    state = state_of(request)
    llm = state.engine()
    raw = await read_json(request)
    return await state.watched(request.receive, _create(request, state, llm, raw))


async def _create(
    request: Request, state: AppState, llm: AsyncLLM, raw: dict[str, Any]
) -> Response:
    body = ChatBody.parse(raw)
    model = state.resolve_model(body.model)
    messages = read_messages(body.messages)
    body.check()
    body.limit.check(1, llm.model.max_model_len)
    answer = Answer(
        request,
        body,
        llm,
        model,
        state.server,
        prefix="chatcmpl-",
        chunk_kind="chat.completion.chunk",
    )
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    id_length = state.parsers.tool.id_length if state.parsers.tool else None
    thinking = body.wanted_thinking
    template = state.template_of(body.chat_template)
    variables = _variables(template or llm.input_processor.template)
    kwargs, unread = _template_kwargs(state, body, tools, thinking, variables)
    unset = [f"chat_template_kwargs.{name}" for name in kwargs if name not in variables]
    prompt_text, prompt_ids = await llm.input_processor.render_chat(
        messages if id_length is None else with_short_ids(messages, id_length),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        template_kwargs=kwargs | {"tools": tools.tools or None, "documents": body.documents},
        template=template,
        truncation=body.truncation(llm.model.max_model_len, body.limit.value),
    )
    last = messages[-1]
    continued = last["content"] if body.continue_final_message else None
    parsing = _parsing(state, tools, prompt_text, continued)
    grammar, thinks = await grammar_for(llm, body, tools, state.parsers, prompt_text, continued)
    budget = await budget_for(
        llm,
        thinking.budget if thinks else None,
        thinking.param,
        state.parsers,
        prompt_text if continued is None else continued,
        continued is not None,
        tools.active,
    )
    extra = {
        "grammar": grammar,
        "reasoning_budget": budget,
        "extra_args": llm.input_processor.read_extra_args(body.vllm_xargs),
    }
    params, clamped = _params(llm, body, len(prompt_ids), _masks(state, tools), extra)
    if state.server.enable_log_requests:
        logger.info("request %s: %d prompt tokens", answer.request_id, len(prompt_ids))
    stream = await submit(
        llm,
        body,
        prompt_ids,
        params,
        request_id=answer.request_id,
        prompt_text=prompt_text,
        parsing=parsing,
    )
    generation = Generation([stream], body.n)
    headers = ChatBody.ignored(raw, [*unread, *body.unread(llm.model)])
    add_ignored(headers, [*unset, *(params.grammar.ignored if params.grammar else ())])
    if clamped is not None:
        headers["x-llmserve-max-tokens"] = str(clamped)
    role = state.server.response_role if body.add_generation_prompt else last["role"]
    echo = last["content"] if body.echo and last["role"] == role else ""
    names = TokenNames(llm.tokenizer, body.return_tokens_as_token_ids)
    on_end = None
    if tools.active and state.parsers.tool is not None and state.stats is not None:
        on_end = partial(state.stats.on_tool_parse, body.stream)
    view = View.of(
        state.server.reasoning_field,
        thinking.shown,
        parsing is not None,
        tools.named is not None,
        on_end,
    )
    prompt: dict[str, Any] = {}
    if body.return_token_ids:
        prompt["prompt_token_ids"] = prompt_ids
    if body.return_prompt_text:
        prompt["prompt_text"] = prompt_text
    if body.stream:
        writer = ChatWriter(answer, body, generation, names, role, echo, prompt, view)
        return EventStream(state, generation, writer, Pace(answer.stream_interval), headers)
    choices = await generation.collect()
    parts = (answer, body, generation, choices, names, role, echo, prompt, view, headers)
    number = generation.streams[0].num_prompt_logprobs + num_logprobs(choices)
    return await write(number, _whole, *parts)


def _variables(template: ChatTemplate | None) -> frozenset[str]:
    return template.variables if template else frozenset()


def _template_kwargs(
    state: AppState,
    body: ChatBody,
    tools: ToolUse,
    thinking: Thinking,
    variables: frozenset[str],
) -> tuple[dict[str, Any], list[str]]:
    """Variables for the template, and the fields that it has no use for."""
    given = check_template_kwargs(body.chat_template_kwargs)
    parser = state.parsers.reasoning
    efforts = parser.efforts if parser else None
    wanted = thinking_kwargs(thinking, given, variables, efforts)
    unread = []
    if thinking.enabled is not None and thinking.budget is None and not wanted:
        names = ("reasoning_effort", "reasoning", "thinking")
        unread += [name for name in names if getattr(body, name) is not None]
    if tools.tools and "tools" not in variables:
        unread.append("tools")
    if body.documents and "documents" not in variables:
        unread.append("documents")
    return wanted | given, unread


def _masks(state: AppState, tools: ToolUse) -> dict[int, float]:
    """Biases that keep a model with tools it must not call from beginning a call."""
    parser = state.parsers.tool
    if not tools.tools or tools.mode != "none" or parser is None:
        return {}
    tokenizer = state.engine().tokenizer
    openers = () if tokenizer is None else map(tokenizer.token_id, parser.openers)
    return {token: -100.0 for token in openers if token is not None}


def _parsing(state: AppState, tools: ToolUse, prompt: str, continued: str | None) -> Parsing | None:
    """How the output is to be read; None if all of it is content."""

    schemas = tools.schemas if tools.active else None
    if not state.parsers.parses(schemas):
        return None

    def new_parser() -> OutputParser:
        return state.parsers.make(
            schemas,
            prompt if continued is None else continued,
            continued is not None,
            allowed=tools.allowed,
            max_calls=None if tools.parallel else 1,
        )

    return Parsing(new_parser, state.shown_tokens)


def _params(
    llm: AsyncLLM,
    body: ChatBody,
    prompt_len: int,
    masks: dict[int, float],
    extra: dict[str, Any],
) -> tuple[SamplingParams, int | None]:
    fields = body.sampling_fields()
    fields |= {"logprobs": body.num_logprobs, "max_tokens": body.limit.value}
    if masks:
        fields["logit_bias"] = masks | fields.get("logit_bias", {})
    fields |= extra
    try:
        return llm.input_processor.make_params(fields, prompt_len=prompt_len, param="messages")
    except RequestError as error:
        if error.param != "logprobs":
            raise
        raise RequestError(f"top_{error.message}", param="top_logprobs", code=error.code) from None


def _whole(
    answer: Answer,
    body: ChatBody,
    generation: Generation,
    gathered: list[Choice],
    names: TokenNames,
    role: str,
    echo: str,
    prompt: dict[str, Any],
    view: View,
    headers: dict[str, str],
) -> Response:
    choices = []
    for index, choice in enumerate(gathered):
        message = {
            "role": role,
            "content": None,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        } | view.message(choice)
        if echo:
            message["content"] = echo + choice.text
        token_ids = view.shown(choice.token_ids, choice.hidden)
        logprobs = view.shown(choice.logprobs, choice.hidden)
        whole = {
            "index": index,
            "message": message,
            "logprobs": names.chat(logprobs) if body.logprobs else None,
            "finish_reason": view.finish_reason(
                choice.finish_reason, choice.stop_reason, "tool_calls" in message
            ),
            "stop_reason": choice.stop_reason,
            "token_ids": token_ids if body.return_token_ids else None,
        }
        choices.append(written(whole))
    prompt_logprobs = generation.streams[0].prompt_logprobs
    result = answer.frame("chat.completion") | {
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": answer.fingerprint,
        "usage": generation.usage(),
        "prompt_logprobs": names.prompt(prompt_logprobs) if prompt_logprobs else None,
        "prompt_token_ids": prompt.get("prompt_token_ids"),
        "prompt_text": prompt.get("prompt_text"),
        "kv_transfer_params": None,
    }
    return json_response(result, headers)
