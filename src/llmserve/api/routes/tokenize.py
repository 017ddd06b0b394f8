# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /tokenize and /detokenize."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from llmserve.api.answer import json_response
from llmserve.api.chat_messages import check_template_kwargs, read_messages
from llmserve.api.errors import invalid_type, invalid_value, missing
from llmserve.api.fields import MAX_TEMPLATE_CHARS, RequestBody, read_json
from llmserve.api.logprobs import TokenNames
from llmserve.api.openapi import MESSAGES, STRING, TEXT, TOKENS, described, nullable
from llmserve.api.state import AppState, state_of
from llmserve.api.tools import read_tools
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.tokenizer import Tokenizer

router = APIRouter()

_MAX_TOKEN_ID = 2**63 - 1


class TokenizeBody(RequestBody):
    """`prompt`, or `messages` as in a chat request. `add_special_tokens` is on for prompts only."""

    prompt: Any = None
    messages: Any = None
    tools: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE_CHARS)
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    return_token_strs: bool = False


class DetokenizeBody(RequestBody):
    """`tokens` may hold ids that the vocabulary does not have; they give no text."""

    tokens: list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]]


@router.post(
    "/tokenize",
    openapi_extra=described(
        TOKENS, TokenizeBody, prompt=nullable(STRING), messages=nullable(MESSAGES)
    ),
)
async def tokenize(request: Request) -> Response:
    """The ids that a request with this prompt or these messages would have."""
    state = state_of(request)
    llm = state.engine()
    raw = await read_json(request)
    body = TokenizeBody.parse(raw)
    state.resolve_model(body.model)
    tokenizer = _tokenizer(llm)
    ids = await _encode(state, llm, body)
    strings = [TokenNames(tokenizer, False).name(token) for token in ids]
    result = {
        "count": len(ids),
        "max_model_len": llm.model.max_model_len,
        "tokens": ids,
        "token_strs": strings if body.return_token_strs else None,
    }
    return json_response(result, TokenizeBody.ignored(raw))


async def _encode(state: AppState, llm: AsyncLLM, body: TokenizeBody) -> list[int]:
    if body.prompt is not None and body.messages is not None:
        raise invalid_value("prompt", "it must not be given together with messages")
    if body.messages is not None:
        if body.continue_final_message and body.add_generation_prompt:
            raise invalid_value(
                "continue_final_message", "it must not be true together with add_generation_prompt"
            )
        tools = read_tools(body.tools, None, True)
        kwargs = check_template_kwargs(body.chat_template_kwargs)
        _, ids = await llm.input_processor.render_chat(
            read_messages(body.messages),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=bool(body.add_special_tokens),
            template_kwargs=kwargs | {"tools": tools.tools or None, "documents": body.documents},
            template=state.template_of(body.chat_template),
        )
        return ids
    if body.prompt is None:
        raise missing("prompt")
    if not isinstance(body.prompt, str):
        raise invalid_type("prompt", "a string", body.prompt)
    return await llm.input_processor.encode_prompt(
        body.prompt, add_special_tokens=body.add_special_tokens is not False, param="prompt"
    )


@router.post("/detokenize", openapi_extra=described(TEXT, DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    state = state_of(request)
    llm = state.engine()
    raw = await read_json(request)
    body = DetokenizeBody.parse(raw)
    state.resolve_model(body.model)
    tokenizer = _tokenizer(llm)
    known = [token for token in body.tokens if token < tokenizer.vocab_size]
    result = {"prompt": tokenizer.decode(known, skip_special_tokens=False)}
    return json_response(result, DetokenizeBody.ignored(raw))


def _tokenizer(llm: AsyncLLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise RequestError("This server runs without a tokenizer (--skip-tokenizer-init).")
    return llm.tokenizer
