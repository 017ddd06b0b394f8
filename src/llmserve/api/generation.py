# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The streams of one HTTP request as one: several prompts, n continuations each."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from llmserve.api.fields import GenerationBody
from llmserve.core.messages import FinishReason
from llmserve.core.outputs import Delta, Part
from llmserve.core.sampling_params import MAX_LOGPROBS, SamplingParams
from llmserve.errors import EngineError, RequestError
from llmserve.frontend.async_llm import AsyncLLM, RequestStream
from llmserve.frontend.beam_search import BeamStream
from llmserve.frontend.parsed_text import Parsing

Stream = RequestStream | BeamStream


async def submit(
    llm: AsyncLLM,
    body: GenerationBody,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    request_id: str,
    prompt_text: str | None = None,
    parsing: Parsing | None = None,
) -> Stream:
    """Starts one prompt's continuations, drawn or searched for."""
    if (beam := body.beam) is not None:
        return BeamStream(
            llm,
            prompt_token_ids,
            params,
            beam,
            request_id=request_id,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            parsing=parsing,
        )
    return await llm.submit(
        prompt_token_ids,
        params,
        request_id=request_id,
        prompt_text=prompt_text,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        parsing=parsing,
    )


class Choice(msgspec.Struct):
    """One continuation, gathered."""

    text: str = ""
    parts: list[Part] = []
    token_ids: list[int] = []
    hidden: list[bool] = []
    logprobs: list[tuple[list[int], list[float], int]] = []
    finish_reason: FinishReason | str | None = None
    stop_reason: int | str | None = None


def num_logprobs(made: Iterable[Choice | Delta]) -> int:
    """Log-probabilities of generated tokens, each token's being as many."""
    return sum(len(one.logprobs) * len(one.logprobs[0][0]) for one in made if one.logprobs)


class Generation:
    """`streams[i]` makes the choices from `i * n` on; `remaining` counts unfinished choices."""

    def __init__(self, streams: Sequence[Stream], n: int) -> None:
        self.streams = streams
        self.n = n
        self.remaining = len(streams) * n
        self.num_completion_tokens = 0
        self.num_reasoning_tokens = 0
        self.aborted = False
        self._news: list[Delta] = []
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []

    async def next(self) -> list[Delta]:
        """What is new, waiting until something is; raises what the engine raised."""
        deltas = await (_news(self.streams[0]) if len(self.streams) == 1 else self._any())
        for delta in deltas:
            self.num_completion_tokens += len(delta.token_ids)
            self.num_reasoning_tokens += delta.num_reasoning
            if delta.finish_reason is not None:
                self.remaining -= 1
                if delta.finish_reason == "error":
                    raise EngineError("The engine could not finish this request.")
        return deltas

    async def _any(self) -> list[Delta]:
        if not self._pumps:
            self._pumps = [
                asyncio.ensure_future(self._pump(index, stream))
                for index, stream in enumerate(self.streams)
            ]
        await self._wake.wait()
        self._wake.clear()
        if self._failure is not None:
            raise self._failure
        news, self._news = self._news, []
        return news

    async def _pump(self, index: int, stream: Stream) -> None:
        left = self.n
        try:
            while left:
                for delta in await _news(stream):
                    delta.index += index * self.n
                    left -= delta.finish_reason is not None
                    self._news.append(delta)
                self._wake.set()
        except Exception as error:  # boundary: raised again by the reader of `next`
            self._failure = error
            self._wake.set()

    async def collect(self) -> list[Choice]:
        """All choices, whole; RequestError where their log-probabilities become too many."""
        number = 0
        choices = [Choice() for _ in range(self.remaining)]
        texts: list[list[str]] = [[] for _ in choices]
        try:
            while self.remaining:
                deltas = await self.next()
                number += num_logprobs(deltas)
                if number > MAX_LOGPROBS:  # not before: nobody knows how long answers become
                    raise RequestError(
                        f"logprobs: there are {number} so far; an answer that is not streamed has "
                        f"at most {MAX_LOGPROBS}",
                        param="logprobs",
                        code="integer_above_max_value",
                    )
                for delta in deltas:
                    choice = choices[delta.index]
                    texts[delta.index].append(delta.text)
                    choice.parts += delta.parts
                    choice.token_ids += delta.token_ids
                    choice.hidden += delta.hidden
                    choice.logprobs += delta.logprobs or []
                    choice.finish_reason = delta.finish_reason
                    choice.stop_reason = delta.stop_reason
        finally:
            self.abort()
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)
        return choices

    def abort(self) -> None:
        """Gives back what the engine still holds; nothing happens to what is finished."""
        self.aborted = True
        for pump in self._pumps:
            pump.cancel()
        for stream in self.streams:
            if not stream.finished:
                stream.abort()

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came out of the prefix cache."""
        return sum(stream.num_cached_tokens or 0 for stream in self.streams)

    def usage(self) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them: a prompt once, however many continuations."""
        prompt = sum(len(stream.prompt_token_ids) for stream in self.streams)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self.num_completion_tokens,
            "completion_tokens": self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "completion_tokens_details": (
                {"reasoning_tokens": self.num_reasoning_tokens}
                if self.num_reasoning_tokens
                else None
            ),
        }


async def _news(stream: Stream) -> list[Delta]:
    deltas = await stream.next()
    if not deltas and stream.finished:
        raise EngineError("The request was aborted.")
    return deltas


class Pace:
    """Merges a choice's deltas until it has `interval` new tokens; the first goes out at once."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: dict[int, Delta] = {}
        self._begun: set[int] = set()

    def take(self, deltas: list[Delta]) -> list[Delta]:
        """What may go out now."""
        if self._interval == 1:
            return deltas
        return [paced for delta in deltas if (paced := self._take(delta)) is not None]

    def _take(self, delta: Delta) -> Delta | None:
        held = self._held.pop(delta.index, None)
        if held is not None:
            delta.text = held.text + delta.text
            delta.parts = held.parts + delta.parts
            delta.token_ids = held.token_ids + delta.token_ids
            delta.hidden = held.hidden + delta.hidden
            if held.logprobs is not None:
                delta.logprobs = held.logprobs + (delta.logprobs or [])
        if (
            delta.finish_reason is not None
            or len(delta.token_ids) >= self._interval
            or delta.index not in self._begun
        ):
            self._begun.add(delta.index)
            return delta
        self._held[delta.index] = delta
        return None
