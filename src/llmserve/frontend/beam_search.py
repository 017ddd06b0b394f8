# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Beam search over an engine that knows none: each step is one token of each live beam.

The engine gives the likeliest next tokens of every beam; the prefix cache makes the tokens before
them cheap. The rules are those of transformers' generate(num_beams=...): a hypothesis is worth its
log-probability divided by the number of its new tokens to the power of `length_penalty`.
"""

import heapq
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from llmserve.core.messages import FinishReason, RequestExtra
from llmserve.core.outputs import Delta
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import EngineError, RequestError
from llmserve.frontend.async_llm import AsyncLLM, RequestStream
from llmserve.frontend.detokenizer import OutputText
from llmserve.frontend.output_processor import Continuation, LogprobEntry, Request
from llmserve.frontend.parsed_text import Parsing
from llmserve.frontend.tokenizer import Tokenizer

# Fields that say how to draw: nothing is drawn, so they mean nothing.
WITHOUT_EFFECT = ("temperature", "top_p", "top_k", "min_p", "seed")
# Every other field would have to act inside the engine's draw, whose result is not used.
_HONOURED = frozenset(
    {"n", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "logprobs", "detokenize",
     "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}
)  # fmt: skip


class BeamOptions(NamedTuple):
    """What beam search has beside SamplingParams, whose `n` is its width."""

    length_penalty: float = 1.0
    early_stopping: bool = False  # end with the n-th hypothesis, even if a better one may come


class BeamSearchParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `LLM.beam_search` takes, with vLLM's names and defaults. `temperature` has no effect."""

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool = False

    def sampling_params(self) -> SamplingParams:
        """RequestError for a field out of its range."""
        return SamplingParams(
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


class BeamSearchSequence(msgspec.Struct):
    """One hypothesis of `LLM.beam_search`; `tokens` and `text` begin with the prompt."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: str
    stop_reason: int | str | None = None


class BeamSearchOutput(msgspec.Struct):
    """One prompt's hypotheses, best first."""

    sequences: list[BeamSearchSequence]


class Beam(NamedTuple):
    """The new tokens of a hypothesis, the sum of their log-probabilities, and those of each."""

    tokens: list[int]
    score: float
    logprobs: list[LogprobEntry]


class Hypothesis(msgspec.Struct):
    """A finished beam; `value` is what the best are chosen by."""

    beam: Beam
    value: float
    finish_reason: FinishReason
    stop_reason: int | None


def check_beam_params(params: SamplingParams) -> None:
    """RequestError for a field that beam search cannot honour."""
    plain = SamplingParams()
    names = {"reasoning_budget": "thinking_token_budget", "extra_args": "vllm_xargs"}
    if params.grammar is not None:
        names["grammar"] = params.grammar.param
    for name in SamplingParams.__struct_fields__:
        if name in _HONOURED or name in WITHOUT_EFFECT:
            continue
        if getattr(params, name) != getattr(plain, name):
            param = names.get(name, name)
            raise RequestError(
                f"{param} is not supported together with beam search",
                param=param,
                code="unsupported_parameter",
            )
    if not params.max_tokens:
        raise RequestError(
            "max_tokens must be at least 1 for beam search, got 0",
            param="max_tokens",
            code="integer_below_min_value",
        )


class BeamSearch:
    """One prompt's search, without input or output. `params.max_tokens` must be a number.

    While not `done`: let the engine take one token after each of `live`, asking with
    `step_params`, and give `advance` what it said.
    """

    def __init__(
        self,
        params: SamplingParams,
        options: BeamOptions,
        eos_token_ids: Collection[int],
        logits_width: int,
    ) -> None:
        check_beam_params(params)
        assert params.max_tokens is not None
        self.params = params
        self.live = [Beam([], 0.0, [])]
        self.best: list[Hypothesis] = []  # at most n, best first
        self.done = False
        self._options = options
        self._width = params.n
        self._max_tokens = params.max_tokens
        self._ends = frozenset(eos_token_ids) | frozenset(params.stop_token_ids)
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._stops = self._eos | frozenset(params.stop_token_ids)
        # n of them can go on even if the likeliest tokens of every beam are all the ends.
        self._num_candidates = self._width * max(2, 1 + len(self._ends))
        self.step_params = SamplingParams(
            max_tokens=1,
            ignore_eos=True,
            logprobs=min(logits_width, max(self._num_candidates, params.logprobs or 0)),
            seed=0,
            detokenize=False,
        )

    def advance(self, news: list[LogprobEntry]) -> None:
        """`news[i]` are the likeliest tokens after `live[i]`, from column 1 on."""
        length = len(self.live[0].tokens) + 1
        last = length == self._max_tokens
        banned = self._ends if length <= self.params.min_tokens else ()
        candidates = heapq.nlargest(
            self._num_candidates,
            (
                (beam.score + value, token, value, index)
                for index, (beam, (ids, values, _)) in enumerate(zip(self.live, news, strict=True))
                for token, value in zip(ids[1:], values[1:], strict=True)
                if token not in banned
            ),
            key=lambda candidate: candidate[0],
        )
        live: list[Beam] = []
        for place, (score, token, value, index) in enumerate(candidates):
            stops = token in self._stops
            if stops or last:
                if place < self._width:
                    beam = self._extended(index, token, value, score, news[index])
                    self._finish(beam, token if stops else None)
            elif len(live) < self._width:
                live.append(self._extended(index, token, value, score, news[index]))
        self.live = live
        self.done = not live or (len(self.best) == self._width and self._is_settled(length))

    def _extended(
        self, index: int, token: int, value: float, score: float, news: LogprobEntry
    ) -> Beam:
        beam = self.live[index]
        logprobs: list[LogprobEntry] = []
        if self.params.logprobs is not None:
            ids, values, _ = news
            end = 1 + self.params.logprobs
            entry = [token, *ids[1:end]], [value, *values[1:end]], 1 + ids[1:].index(token)
            logprobs = [*beam.logprobs, entry]
        return Beam([*beam.tokens, token], score, logprobs)

    def _finish(self, beam: Beam, stop: int | None) -> None:
        value = beam.score / len(beam.tokens) ** self._options.length_penalty
        reason: FinishReason = "length" if stop is None else "stop"
        stop_reason = None if stop in self._eos else stop
        self.best.append(Hypothesis(beam, value, reason, stop_reason))
        self.best.sort(key=lambda hypothesis: -hypothesis.value)
        del self.best[self._width :]

    def _is_settled(self, length: int) -> bool:
        """Whether n hypotheses are enough: no live beam seems to become better than the worst."""
        possible = self.live[0].score / length**self._options.length_penalty
        return self._options.early_stopping or possible <= self.best[-1].value

    def output(self, tokenizer: Tokenizer | None, prompt: list[int]) -> BeamSearchOutput:
        """All that was found, for `LLM.beam_search`."""
        before = tokenizer.decode(prompt, self.params.skip_special_tokens) if tokenizer else ""
        return BeamSearchOutput(
            [
                BeamSearchSequence(
                    prompt + found.beam.tokens,
                    before + self.text(found, tokenizer, prompt),
                    found.beam.score,
                    found.finish_reason,
                    found.stop_reason,
                )
                for found in self.best
            ]
        )

    def text(self, hypothesis: Hypothesis, tokenizer: Tokenizer | None, prompt: list[int]) -> str:
        """The new text, without the stop token's unless it was asked for."""
        if tokenizer is None or not self.params.detokenize:
            return ""
        tokens = hypothesis.beam.tokens
        if hypothesis.finish_reason == "stop" and not self.params.include_stop_str_in_output:
            tokens = tokens[:-1]
        output = OutputText(tokenizer, self.params, prompt)
        output.feed(tokens)
        output.finish()
        return output.take()


class BeamStream:
    """A search as a RequestStream: one Delta a hypothesis, best first, all at its end."""

    def __init__(
        self,
        llm: AsyncLLM,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: BeamOptions,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        parsing: Parsing | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.num_cached_tokens = 0
        self.prompt_logprobs = None
        self.num_prompt_logprobs = 0
        self.finished = False
        model = llm.model
        self._search = BeamSearch(params, options, model.eos_token_ids, model.logits_width)
        self._llm = llm
        self._priority = priority
        self._cache_salt = cache_salt
        self._parsing = parsing
        self._asked: list[RequestStream] = []

    async def next(self) -> list[Delta]:
        """All hypotheses; then empty. Raises the LLMServeError that ended the search."""
        if self.finished:
            return []
        search = self._search
        try:
            while not search.done:
                search.advance(await self._step())
        finally:
            self.abort()
        return [self._delta(index, found) for index, found in enumerate(search.best)]

    def abort(self) -> None:
        """Ends the search; idempotent."""
        self.finished = True
        for stream in self._asked:
            stream.abort()

    async def _step(self) -> list[LogprobEntry]:
        search = self._search
        self._asked = []
        for beam in search.live:
            stream = await self._llm.submit(
                self.prompt_token_ids + beam.tokens,
                search.step_params,
                request_id=f"{self.request_id}-{len(beam.tokens)}-{len(self._asked)}",
                priority=self._priority,
                cache_salt=self._cache_salt,
            )
            self._asked.append(stream)
        news: list[LogprobEntry] = []
        for stream in self._asked:
            async for deltas in stream:
                news += deltas[0].logprobs or []
        if len(news) != len(search.live):
            raise EngineError("The request was aborted.")
        if len(search.live[0].tokens) == 0:
            self.num_cached_tokens = self._asked[0].num_cached_tokens
        return news

    def _delta(self, index: int, found: Hypothesis) -> Delta:
        params = self._search.params
        request = Request(self.request_id, self.prompt_token_ids, params, parsing=self._parsing)
        read = Continuation(request, index, params, self._llm.tokenizer)
        read.new_ids, read.new_logprobs = found.beam.tokens, found.beam.logprobs
        read.ending = RequestExtra(finish_reason=found.finish_reason, stop_reason=found.stop_reason)
        read.advance()
        return read.take()
