# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /v1/chat/completions."""

from typing import Any

from fastapi import APIRouter, Request, Response

from llmserve.api.answer import Answer, json_response
from llmserve.api.chat_messages import check_template_kwargs, read_messages
from llmserve.api.fields import read_json
from llmserve.api.generation import Generation, submit
from llmserve.api.logprobs import TokenNames
from llmserve.api.openapi import CHAT, MESSAGES, described
from llmserve.api.routes.chat.schema import ChatBody
from llmserve.api.routes.chat.stream import ChatWriter
from llmserve.api.sse import EventStream
from llmserve.api.state import AppState, state_of
from llmserve.api.structured import add_ignored, grammar_of
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM
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
    kwargs = check_template_kwargs(body.chat_template_kwargs)
    prompt_text, prompt_ids = await llm.input_processor.render_chat(
        messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens,
        template_kwargs=kwargs,
        truncation=body.truncation(llm.model.max_model_len, body.limit.value),
    )
    params, clamped = _params(llm, body, len(prompt_ids), await grammar_of(llm, body))
    if state.server.enable_log_requests:
        logger.info("request %s: %d prompt tokens", answer.request_id, len(prompt_ids))
    stream = await submit(
        llm, body, prompt_ids, params, request_id=answer.request_id, prompt_text=prompt_text
    )
    generation = Generation([stream], body.n)
    headers = ChatBody.ignored(raw)
    add_ignored(headers, params.grammar)
    if clamped is not None:
        headers["x-llmserve-max-tokens"] = str(clamped)
    last = messages[-1]
    role = state.server.response_role if body.add_generation_prompt else last["role"]
    echo = last["content"] if body.echo and last["role"] == role else ""
    names = TokenNames(llm.tokenizer, body.return_tokens_as_token_ids)
    prompt: dict[str, Any] = {}
    if body.return_token_ids:
        prompt["prompt_token_ids"] = prompt_ids
    if body.return_prompt_text:
        prompt["prompt_text"] = prompt_text
    if body.stream:
        writer = ChatWriter(answer, body, generation, names, role, echo, prompt)
        return EventStream(state, generation, writer, headers)
    return await _whole(answer, body, generation, names, role, echo, prompt, headers)


def _params(
    llm: AsyncLLM, body: ChatBody, prompt_len: int, grammar: GrammarSpec | None
) -> tuple[SamplingParams, int | None]:
    fields = body.sampling_fields()
    fields |= {"logprobs": body.num_logprobs, "max_tokens": body.limit.value}
    fields["grammar"] = grammar
    try:
        return llm.input_processor.make_params(fields, prompt_len=prompt_len, param="messages")
    except RequestError as error:
        if error.param != "logprobs":
            raise
        raise RequestError(f"top_{error.message}", param="top_logprobs", code=error.code) from None


async def _whole(
    answer: Answer,
    body: ChatBody,
    generation: Generation,
    names: TokenNames,
    role: str,
    echo: str,
    prompt: dict[str, Any],
    headers: dict[str, str],
) -> Response:
    choices = []
    for index, choice in enumerate(await generation.collect()):
        message = {
            "role": role,
            "content": echo + choice.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": names.chat(choice.logprobs) if body.logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "token_ids": choice.token_ids if body.return_token_ids else None,
            }
        )
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
