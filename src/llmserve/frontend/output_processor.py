# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine's columns into each request's text: the same code for streams and for `LLM`."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import numpy as np

from llmserve.core.messages import (
    AbortRequests,
    EngineOutputs,
    EngineRequest,
    LogprobColumns,
    RequestExtra,
    SchedulerStats,
)
from llmserve.core.outputs import CompletionOutput, Delta, Logprob, Part, RequestOutput
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import GRAMMAR_ERROR
from llmserve.engine.client import EngineClient
from llmserve.errors import (
    DeadlineError,
    EngineDeadError,
    EngineError,
    GrammarError,
    LLMServeError,
    NumericalError,
    OverloadedError,
    RequestError,
)
from llmserve.frontend.caller import CALLER
from llmserve.frontend.detokenizer import OutputText
from llmserve.frontend.parsed_text import ParsedText, Parsing
from llmserve.frontend.repetition import RepetitionSearch
from llmserve.frontend.tokenizer import Tokenizer
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_ID_BYTES = 8
LOGPROB_BYTES = 16

LogprobEntry = tuple[list[int], list[float], int]  # token ids, log-probabilities, the token's rank

_ERRORS: dict[str, type[LLMServeError]] = {
    "server_is_overloaded": OverloadedError,
    "queue_timeout": OverloadedError,
    "request_timeout": DeadlineError,
    "numerical_error": NumericalError,
    "engine_restarted": EngineDeadError,
    "server_error": EngineError,
}


_CODES = {"queue_timeout": "queue_timeout"}  # where the class does not say it


class RequestTimings(msgspec.Struct, kw_only=True):
    """One engine request, of which a request has `n`. Times are time.monotonic() seconds.

    `queue_time` is seconds from arrival to the first schedule. Times not reached are None.
    """

    arrival: float
    num_prompt_tokens: int
    max_tokens: int | None
    n: int
    queue_time: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish: float | None = None
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: str | None = None


class RequestObserver(Protocol):
    """Hears of requests as they go; metrics implement it. Calls must be short and not raise."""

    def on_arrival(self, timings: RequestTimings) -> None:
        """Sent to the engine."""

    def on_first_token(self, timings: RequestTimings) -> None:
        """`first_token`, `queue_time` and `num_cached_tokens` are set."""

    def on_tokens(self, timings: RequestTimings, count: int, seconds: float) -> None:
        """`count` more tokens, `seconds` after the ones before; not called for the first ones."""

    def on_finish(self, timings: RequestTimings) -> None:
        """The end, whatever its reason; called once."""

    def on_step(self) -> None:
        """All that came of the engine's last steps was told."""


class Continuation:
    """One engine request: what came of it, and what of that nobody has taken yet."""

    def __init__(
        self, request: "Request", index: int, params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.request = request
        self.index = index
        self.include_stop = params.include_stop_str_in_output
        self.text: OutputText | ParsedText | None = None
        self.counter: ParsedText | None = None
        if params.detokenize and tokenizer is not None:
            ids, parsing = request.prompt_token_ids, request.parsing
            if parsing is None or parsing.counts:
                self.text = OutputText(tokenizer, params, ids)
            else:
                self.text = ParsedText(tokenizer, params, ids, parsing)
            if parsing is not None and parsing.counts:
                self.counter = ParsedText(tokenizer, params.clone(stop=[]), ids, parsing)
        self.wants_logprobs = params.logprobs is not None
        detection = params.repetition_detection
        self.repetition = RepetitionSearch(detection) if detection else None
        self.timings = RequestTimings(
            arrival=request.arrival,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=params.max_tokens,
            n=request.n,
        )
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.new_ids: list[int] = []  # from the engine, not looked at yet
        self.new_logprobs: list[LogprobEntry] = []
        self.ending: RequestExtra | None = None
        self.out_text: list[str] = []  # looked at, not taken yet
        self.out_parts: list[Part] = []
        self.out_ids: list[int] = []
        self.out_logprobs: list[LogprobEntry] = []
        self.held_bytes = 0  # about what is looked at and not taken
        self.queued = False  # in request.news
        self.message: EngineRequest | None = None  # as sent, until something comes of it

    def advance(self) -> bool:
        """Looks at what is new; True if the engine must be told to stop."""
        ids, logprobs = self.new_ids, self.new_logprobs
        self.new_ids, self.new_logprobs = [], []
        ended_by_engine = self.ending is not None
        repeated = None if self.repetition is None else self.repetition.feed(ids)
        if repeated is not None and (repeated < len(ids) or not ended_by_engine):
            del ids[repeated:], logprobs[repeated:]
            self.ending = RequestExtra(finish_reason="repetition")
        stopped = self._add_text(ids)
        if stopped is not None:
            del ids[stopped:], logprobs[stopped:]
        self.out_ids += ids
        self.out_logprobs += logprobs
        self.held_bytes += _ID_BYTES * len(ids)
        self.held_bytes += sum(LOGPROB_BYTES * len(entry[0]) for entry in logprobs)
        self.timings.num_generation_tokens += len(ids)
        if self.text is not None and self.text.stop_reason is not None:
            self.finish_reason, self.stop_reason = "stop", self.text.stop_reason
            return not ended_by_engine
        if self.ending is not None:
            self.finish_reason = self.ending.finish_reason
            self.stop_reason = self.ending.stop_reason
        return self.ending is not None and not ended_by_engine

    def _add_text(self, ids: list[int]) -> int | None:
        """The number of tokens up to a stop string, or None."""
        if self.text is None:
            return None
        hidden = (
            self.ending is not None
            and self.ending.finish_reason == "stop"
            and not self.include_stop
            and bool(ids)
        )  # the engine stops at tokens, and the one it stopped at is no text
        used = self.text.feed(ids[:-1] if hidden else ids)
        if self.counter is not None:
            self.counter.feed(ids[:used])
            self.counter.take()
        if isinstance(self.text, ParsedText):
            self._add_parts(self.text, hidden)
            return None if self.text.stop_reason is None else used
        if self.text.stop_reason is None and self.ending is not None:
            self.text.finish()
        if text := self.text.take():
            self.out_text.append(text)
            self.held_bytes += len(text)
        return None if self.text.stop_reason is None else used

    def _add_parts(self, text: ParsedText, hidden: bool) -> None:
        if text.stop_reason is None and self.ending is not None:
            if hidden:
                text.skip()
            text.finish(complete=self.ending.finish_reason == "stop")
        parts = text.take()
        self.out_parts += parts
        self.out_text += [part.text for part in parts if part.kind == "content"]

    def take(self) -> Delta:
        """What is new since the last call."""
        parsed = self.text if isinstance(self.text, ParsedText) else None
        delta = Delta(
            index=self.index,
            text="".join(self.out_text),
            token_ids=self.out_ids,
            logprobs=self.out_logprobs if self.wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        if self.counter is not None:
            delta.num_reasoning, self.counter.num_reasoning = self.counter.num_reasoning, 0
            self.counter.hidden.clear()
        if parsed is not None:
            delta.parts, self.out_parts = self.out_parts, []
            delta.hidden, parsed.hidden = parsed.hidden, []
            delta.num_reasoning, parsed.num_reasoning = parsed.num_reasoning, 0
        self.out_text, self.out_ids, self.out_logprobs = [], [], []
        self.held_bytes = 0
        self.queued = False
        return delta


class Request:
    """One caller's request: `n` continuations of one prompt. `on_news` is called when `news` or
    `error` has something after it had nothing."""

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt_text: str | None = None,
        parsing: Parsing | None = None,
    ) -> None:
        self.request_id = request_id
        self.parsing = parsing
        self.prompt_token_ids = prompt_token_ids
        self.prompt_text = prompt_text
        self.params = params
        self.n = params.n
        self.arrival = time.monotonic()
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.unfinished: dict[int, Continuation] = {}  # by wire id
        self.news: list[Continuation] = []
        self.error: LLMServeError | None = None
        self.max_held_bytes: int | None = None  # of one continuation, before it is given up
        self.on_news: Callable[[], None] | None = None
        self.resent = False
        self._prompt_logprobs: list[LogprobEntry] = []

    @property
    def finished(self) -> bool:
        """Whether the engine has nothing more to say about it."""
        return not self.unfinished

    @property
    def begun(self) -> bool:
        """Whether anything of its output came."""
        return len(self.unfinished) < self.n or any(
            continuation.message is None for continuation in self.unfinished.values()
        )

    def restart(self) -> None:
        """Back to where it was when it was sent; nothing of its output came."""
        self.resent = True
        self._prompt_logprobs = []

    def take(self) -> list[Delta]:
        """What is new, one entry a continuation; raises the error that ended the request."""
        if self.error is not None:
            raise self.error
        news, self.news = self.news, []
        return [continuation.take() for continuation in news]

    def prompt_logprobs(
        self, tokenizer: Tokenizer | None
    ) -> list[dict[int, Logprob] | None] | None:
        """One entry a prompt token, the first None; None as a whole if they were not asked for."""
        if self.params.prompt_logprobs is None:
            return None
        return [None, *(logprob_dict(entry, tokenizer) for entry in self._prompt_logprobs)]

    def add_prompt_logprobs(self, columns: LogprobColumns) -> None:
        """A chunk of the prompt, in order."""
        self._prompt_logprobs += _entries(columns)

    def post(self, continuation: Continuation) -> None:
        """`continuation` has something to take."""
        if not continuation.queued:
            continuation.queued = True
            self.news.append(continuation)
            if len(self.news) == 1 and self.on_news is not None:
                self.on_news()

    def fail(self, error: LLMServeError) -> None:
        """Ends the request; the first error stays."""
        if self.error is None:
            self.error = error
            if self.on_news is not None:
                self.on_news()


class OutputProcessor:
    """Sends requests to the engine and knows them by wire id until they end."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer | None) -> None:
        self.observer: RequestObserver | None = None
        self.stats = SchedulerStats()
        self._client = client
        self._tokenizer = tokenizer
        self._known: dict[int, Continuation] = {}
        self._wire_ids = itertools.count(1)

    @property
    def num_unfinished(self) -> int:
        """Engine requests in flight."""
        return len(self._known)

    def submit(self, request: Request, *, priority: int = 0, cache_salt: str = "") -> None:
        """Sends `n` engine requests, on behalf of the `CALLER` of this context."""
        caller = CALLER.get()
        if 0 < caller.deadline <= time.monotonic():
            raise OverloadedError(
                "The request's time was over before it ran.", code="queue_timeout"
            )
        prompt = np.asarray(request.prompt_token_ids, np.int32).tobytes()
        for index in range(request.n):
            wire_id = next(self._wire_ids) & 0xFFFFFFFF
            params = _child_params(request.params, index)
            continuation = Continuation(request, index, params, self._tokenizer)
            self._known[wire_id] = request.unfinished[wire_id] = continuation
            message = EngineRequest(
                client=self._client.index,
                request_id=wire_id,
                prompt=prompt,
                params=params,
                arrival=request.arrival,
                priority=caller.bounded(priority),
                cache_salt=caller.salted(cache_salt),
                deadline=caller.deadline,
                tenant=caller.tenant,
            )
            continuation.message = message
            self._client.send(message)
            if self.observer is not None:
                self.observer.on_arrival(continuation.timings)

    def abort(self, request: Request) -> None:
        """Forgets the request and frees what the engine holds of it; idempotent."""
        if request.unfinished:
            ids = list(request.unfinished)
            self._client.send(AbortRequests(self._client.index, ids))
            for wire_id in ids:
                self._forget(wire_id, "abort", time.monotonic())

    def fail_all(self, error: LLMServeError) -> None:
        """Ends every request in flight, as when the engine has died."""
        for request in {id(c.request): c.request for c in self._known.values()}.values():
            for wire_id in list(request.unfinished):
                self._forget(wire_id, "error", time.monotonic())
            request.fail(error)

    def change_engine(self, error: LLMServeError) -> None:
        """The engine was lost and the client speaks to the next one: sends what had not begun once
        more, in its order, and ends the rest with `error`. Who was resent before is not again: it
        may be what ends engines."""
        requests = list({id(c.request): c.request for c in self._known.values()}.values())
        for request in requests:
            if request.begun or request.resent:
                for wire_id in list(request.unfinished):
                    self._forget(wire_id, "error", time.monotonic())
                request.fail(error)
                continue
            request.restart()
            for wire_id, continuation in list(request.unfinished.items()):
                del self._known[wire_id], request.unfinished[wire_id]
                wire_id = next(self._wire_ids) & 0xFFFFFFFF
                self._known[wire_id] = request.unfinished[wire_id] = continuation
                assert continuation.message is not None
                continuation.message.request_id = wire_id
                self._client.send(continuation.message)

    def process(self, outputs: Iterable[EngineOutputs]) -> None:
        """All steps that are there: gathers each request's news, then looks at each once."""
        touched: dict[int, Continuation] = {}
        known = self._known
        for step in outputs:
            ids = np.frombuffer(step.ids, np.uint32).tolist()
            for wire_id, token in zip(
                ids, np.frombuffer(step.tokens, np.int32).tolist(), strict=True
            ):
                continuation = known.get(wire_id)
                if continuation is not None:
                    continuation.new_ids.append(token)
                    touched[wire_id] = continuation
            for wire_id, extra in step.extras.items():
                continuation = known.get(wire_id)
                if continuation is not None:
                    _add_extra(continuation, extra)
                    touched[wire_id] = continuation
            if step.stats is not None:
                self.stats = step.stats
        now = time.monotonic()
        stops: list[int] = []
        for wire_id, continuation in touched.items():
            self._advance(wire_id, continuation, now, stops)
        if stops:
            self._client.send(AbortRequests(self._client.index, stops))
        if self.observer is not None:
            self.observer.on_step()

    def _advance(
        self, wire_id: int, continuation: Continuation, now: float, stops: list[int]
    ) -> None:
        request = continuation.request
        if wire_id not in request.unfinished:
            return  # a sibling's error ended it
        ending = continuation.ending
        if ending is not None and ending.error is not None:
            self._fail(request, _error(ending, request.params), now, stops, wire_id)
            return
        most = request.max_held_bytes
        if most is not None and continuation.queued and continuation.held_bytes > most:
            failure = EngineError(
                f"The stream could not be sent as fast as it was made: {continuation.held_bytes} "
                f"bytes of it wait, {most} may. Read faster, or ask for fewer 'logprobs'.",
                code="slow_reader",
            )
            self._fail(request, failure, now, stops, None if ending is None else wire_id)
            return
        before = continuation.timings.num_generation_tokens
        stop = guarded(continuation.advance, lambda error: self._broken(request, error, now, stops))
        if request.error is not None:
            return
        if continuation.timings.num_generation_tokens or continuation.ending is not None:
            continuation.message = None
        if count := continuation.timings.num_generation_tokens - before:
            self._observe_tokens(continuation.timings, count, now)
        if stop:
            stops.append(wire_id)
        if continuation.finish_reason is not None:
            self._forget(wire_id, continuation.finish_reason, now)
        if (
            continuation.out_ids
            or continuation.out_text
            or continuation.out_parts
            or continuation.finish_reason is not None
        ):
            request.post(continuation)

    def _broken(self, request: Request, error: Exception, now: float, stops: list[int]) -> bool:
        logger.error("request %s: its output could not be read", request.request_id, exc_info=error)
        failure = EngineError("The output of this request could not be read.")
        self._fail(request, failure, now, stops, None)
        return False

    def _fail(
        self,
        request: Request,
        error: LLMServeError,
        now: float,
        stops: list[int],
        ended: int | None,
    ) -> None:
        for wire_id in list(request.unfinished):
            self._forget(wire_id, "error", now)
            if wire_id != ended:
                stops.append(wire_id)
        request.fail(error)

    def _forget(self, wire_id: int, reason: str, now: float) -> None:
        continuation = self._known.pop(wire_id)
        del continuation.request.unfinished[wire_id]
        timings = continuation.timings
        timings.finish, timings.finish_reason = now, reason
        if self.observer is not None:
            self.observer.on_finish(timings)

    def _observe_tokens(self, timings: RequestTimings, count: int, now: float) -> None:
        last, timings.last_token = timings.last_token, now
        if last is None:
            timings.first_token = now
        if self.observer is not None:
            if last is None:
                self.observer.on_first_token(timings)
            else:
                self.observer.on_tokens(timings, count, now - last)


def _add_extra(continuation: Continuation, extra: RequestExtra) -> None:
    request, timings = continuation.request, continuation.timings
    if extra.num_cached_tokens is not None:
        timings.num_cached_tokens = extra.num_cached_tokens
        if continuation.index == 0:
            request.num_cached_tokens = extra.num_cached_tokens
    if extra.queue_time is not None:
        timings.queue_time = extra.queue_time
    if extra.num_preemptions > timings.num_preemptions:
        request.num_preemptions += extra.num_preemptions - timings.num_preemptions
        timings.num_preemptions = extra.num_preemptions
    if extra.prompt_logprobs is not None:
        request.add_prompt_logprobs(extra.prompt_logprobs)
    if extra.logprobs is not None:
        continuation.new_logprobs += _entries(extra.logprobs)
    if extra.finish_reason is not None:
        continuation.ending = extra


def _entries(columns: LogprobColumns) -> list[LogprobEntry]:
    # One position a step is the rule: numpy would cost more than all the rest
    ids = memoryview(columns.token_ids).cast("i").tolist()
    logprobs: list[float] = memoryview(columns.logprobs).cast("f").tolist()  # type: ignore[assignment]
    ranks = memoryview(columns.ranks).cast("i").tolist()
    if columns.n == 1:
        return [(ids, logprobs, ranks[0])]
    width = columns.width
    return [
        (ids[at : at + width], logprobs[at : at + width], rank)
        for at, rank in zip(range(0, len(ids), width), ranks, strict=True)
    ]


def _error(extra: RequestExtra, params: SamplingParams) -> LLMServeError:
    code = extra.error or "server_error"
    message = extra.message or code
    if code == GRAMMAR_ERROR and params.grammar is not None:
        return GrammarError(
            f"Invalid value for '{params.grammar.param}': {message}.", param=params.grammar.param
        )
    kind = _ERRORS.get(code)
    return (
        RequestError(message, code=code) if kind is None else kind(message, code=_CODES.get(code))
    )


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    """Continuation 0 is what the request would be with n = 1."""
    if params.n == 1:
        return params
    if index == 0:
        return params.clone(n=1)
    seed = None if params.seed is None else child_seed(params.seed, index)
    return params.clone(n=1, seed=seed, prompt_logprobs=None)


def child_seed(seed: int, index: int) -> int:
    """A well mixed 63-bit seed (splitmix64 of Steele, Lea and Flood, 2014)."""
    mask = (1 << 64) - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def logprob_dict(
    entry: LogprobEntry, tokenizer: Tokenizer | None, num_given: int = 0
) -> dict[int, Logprob]:
    """The token itself first, then the likeliest in order, whose ranks are their places, and the
    `num_given` that the request named."""
    ids, logprobs, rank = entry
    ranked = len(ids) - num_given
    result = {ids[0]: Logprob(logprobs[0], rank)}
    for place, (token, logprob) in enumerate(zip(ids[1:], logprobs[1:], strict=True), 1):
        result.setdefault(token, Logprob(logprob, place if place < ranked else None))
    if tokenizer is not None:
        for token, value in result.items():
            value.decoded_token = tokenizer.token_str(token)
    return result


class Gathered:
    """A request's deltas put together, for callers that want all of it so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self._tokenizer = tokenizer
        wants_logprobs = request.params.logprobs is not None
        self._num_given = len(request.params.logprob_token_ids)
        self._outputs = [
            CompletionOutput(
                index=index,
                text="",
                token_ids=[],
                cumulative_logprob=0.0 if wants_logprobs else None,
                logprobs=[] if wants_logprobs else None,
            )
            for index in range(request.n)
        ]

    def add(self, deltas: list[Delta]) -> None:
        """More of it."""
        for delta in deltas:
            output = self._outputs[delta.index]
            output.text += delta.text
            output.token_ids += delta.token_ids
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            for entry in delta.logprobs or ():
                assert output.logprobs is not None and output.cumulative_logprob is not None
                output.logprobs.append(logprob_dict(entry, self._tokenizer, self._num_given))
                output.cumulative_logprob += entry[1][0]

    def output(self) -> RequestOutput:
        """All so far; the lists inside grow with later `add`s."""
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt_text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=self._outputs,
            finished=all(output.finished() for output in self._outputs),
            prompt_logprobs=request.prompt_logprobs(self._tokenizer),
            num_cached_tokens=request.num_cached_tokens,
        )
