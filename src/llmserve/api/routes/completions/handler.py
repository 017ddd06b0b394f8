# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /v1/completions."""

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from llmserve.api.answer import Answer, json_response, written
from llmserve.api.fields import read_json
from llmserve.api.generation import Choice, Generation, Pace, Stream, num_logprobs, submit
from llmserve.api.logprobs import LegacyLogprobs, TokenNames, join_legacy, write
from llmserve.api.openapi import COMPLETION, PROMPT, described
from llmserve.api.reasoning import budget_for
from llmserve.api.routes.completions.schema import CompletionBody, Prompt
from llmserve.api.routes.completions.stream import CompletionWriter
from llmserve.api.sse import EventStream
from llmserve.api.state import AppState, state_of
from llmserve.api.structured import add_ignored, grammar_of
from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.input_processor import Truncation
from llmserve.frontend.parsed_text import Parsing
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)
router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=described(COMPLETION, CompletionBody, streams=True, prompt=PROMPT),
)
async def create_completion(request: Request) -> Response:
    """Continuations of one or several prompts, whole or streamed."""
    state = state_of(request)
    llm = state.engine()
    raw = await read_json(request)
    return await state.watched(request.receive, _create(request, state, llm, raw))


class _Prompt(NamedTuple):
    """One prompt, ready to go."""

    ids: list[int]
    params: SamplingParams
    parsing: Parsing | None


async def _create(
    request: Request, state: AppState, llm: AsyncLLM, raw: dict[str, Any]
) -> Response:
    body = CompletionBody.parse(raw)
    model = state.resolve_model(body.model)
    prompts = body.prompts
    body.check()
    body.limit.check(0 if body.echo else 1, llm.model.max_model_len)
    answer = Answer(
        request, body, llm, model, state.server, prefix="cmpl-", chunk_kind="text_completion"
    )
    headers = CompletionBody.ignored(raw, body.unread(llm.model))
    truncation = body.truncation(llm.model.max_model_len, body.limit.value)
    encoded: list[_Prompt] = []
    clamps: list[int] = []
    grammar = await grammar_of(llm, body)
    args = llm.input_processor.read_extra_args(body.vllm_xargs)
    for index, prompt in enumerate(prompts):
        param = "prompt" if prompt is body.prompt else f"prompt[{index}]"
        ids = await _encode(llm, body, prompt, param, truncation)
        text = _text(llm, prompt, ids)
        budget = await budget_for(
            llm,
            body.thinking_token_budget if grammar is None else None,
            "thinking_token_budget",
            state.parsers,
            text,
            False,
            False,
        )
        params, clamped = llm.input_processor.make_params(
            _fields(body) | {"grammar": grammar, "reasoning_budget": budget, "extra_args": args},
            prompt_len=len(ids),
            param=param,
        )
        parsing = None
        if state.parsers.reasoning is not None:
            new_parser = partial(state.parsers.make, None, text, False)
            parsing = Parsing(new_parser, state.shown_tokens, counts=True)
        encoded.append(_Prompt(ids, params, parsing))
        if clamped is not None and body.max_tokens is not None:
            clamps.append(clamped)
    encoded[0].params.check_prompt_logprobs(sum(len(one.ids) for one in encoded), body.n)
    if grammar is not None:  # which begins at once: there is no reasoning
        unused = ["thinking_token_budget"] if body.thinking_token_budget is not None else []
        add_ignored(headers, [*unused, *grammar.ignored])
    if clamps:
        headers["x-llmserve-max-tokens"] = str(min(clamps))
    if state.server.enable_log_requests:
        lengths = [len(one.ids) for one in encoded]
        logger.info("request %s: %s prompt tokens", answer.request_id, lengths)
    generation = await _submit(llm, body, answer.request_id, encoded)
    names = TokenNames(llm.tokenizer, body.return_tokens_as_token_ids)
    echoes = [
        _echo(llm, body, prompt if truncation is None else one.ids)
        for prompt, one in zip(prompts, encoded, strict=True)
    ]
    if body.stream:
        writer = CompletionWriter(answer, body, generation, names, echoes)
        return EventStream(state, generation, writer, Pace(answer.stream_interval), headers)
    made = _best(await generation.collect(), body.num_drawn, body.n)
    scored = body.n * sum(stream.num_prompt_logprobs for stream in generation.streams)
    number = scored + num_logprobs(made)
    return await write(number, _whole, answer, body, generation, names, echoes, made, headers)


def _whole(
    answer: Answer,
    body: CompletionBody,
    generation: Generation,
    names: TokenNames,
    echoes: list[str],
    made: list[Choice],
    headers: dict[str, str],
) -> Response:
    choices = []
    for index, choice in enumerate(made):
        stream, echo = generation.streams[index // body.n], echoes[index // body.n]
        whole = {"index": index} | _choice(body, names, echo, stream, choice)
        choices.append(written(whole))
    result = answer.frame("text_completion") | {
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": answer.fingerprint,
        "usage": generation.usage(),
        "kv_transfer_params": None,
    }
    return json_response(result, headers)


def _best(choices: list[Choice], drawn: int, n: int) -> list[Choice]:
    """Of every `drawn` the `n` with the highest mean log-probability of a token, best first."""
    if drawn == n:
        return choices

    def mean(choice: Choice) -> float:
        return sum(values[0] for _, values, _ in choice.logprobs) / max(1, len(choice.logprobs))

    groups = (choices[start : start + drawn] for start in range(0, len(choices), drawn))
    return [one for group in groups for one in sorted(group, key=mean, reverse=True)[:n]]


def _fields(body: CompletionBody) -> dict[str, Any]:
    fields = body.sampling_fields() | {"max_tokens": body.limit.value, "logprobs": body.logprobs}
    if body.num_drawn > body.n:
        fields |= {"n": body.num_drawn, "logprobs": body.logprobs or 0}
    if body.echo and body.logprobs is not None:
        asked = (body.logprobs, body.prompt_logprobs)
        fields["prompt_logprobs"] = -1 if -1 in asked else max(n for n in asked if n is not None)
    return fields


async def _submit(
    llm: AsyncLLM,
    body: CompletionBody,
    request_id: str,
    encoded: list[_Prompt],
) -> Generation:
    streams: list[Stream] = []
    with ExitStack() as on_failure:
        for index, one in enumerate(encoded):
            stream = await submit(
                llm,
                body,
                one.ids,
                one.params,
                request_id=f"{request_id}-{index}" if len(encoded) > 1 else request_id,
                parsing=one.parsing,
            )
            on_failure.callback(stream.abort)
            streams.append(stream)
        on_failure.pop_all()
    return Generation(streams, body.num_drawn)


async def _encode(
    llm: AsyncLLM, body: CompletionBody, prompt: Prompt, param: str, truncation: Truncation | None
) -> list[int]:
    front = llm.input_processor
    if body.suffix:
        return await front.infill_prompt(
            prompt, body.suffix, add_special_tokens=body.add_special_tokens, param=param
        )
    return await front.encode_prompt(
        prompt,
        add_special_tokens=body.add_special_tokens,
        param=param,
        truncation=truncation,
    )


def _text(llm: AsyncLLM, prompt: Prompt, ids: list[int]) -> str:
    """What the model sees, special tokens included."""
    if isinstance(prompt, str) or llm.tokenizer is None:
        return prompt if isinstance(prompt, str) else ""
    return llm.tokenizer.decode(ids[-64:], skip_special_tokens=False)


def _echo(llm: AsyncLLM, body: CompletionBody, prompt: Prompt) -> str:
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return llm.tokenizer.decode(prompt, body.skip_special_tokens) if llm.tokenizer else ""


def _choice(
    body: CompletionBody, names: TokenNames, echo: str, stream: Stream, choice: Choice
) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        legacy = LegacyLogprobs(names)
        prompt = (
            legacy.prompt(stream.prompt_token_ids, stream.prompt_logprobs) if body.echo else None
        )
        logprobs = legacy.completion(choice.logprobs)
        if prompt is not None:
            logprobs = join_legacy(prompt, logprobs)
    scored = stream.prompt_logprobs if body.prompt_logprobs is not None else None
    return {
        "text": echo + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "token_ids": choice.token_ids if body.return_token_ids else None,
        "prompt_logprobs": names.prompt(scored) if scored else None,
        "prompt_token_ids": stream.prompt_token_ids if body.return_token_ids else None,
    }
