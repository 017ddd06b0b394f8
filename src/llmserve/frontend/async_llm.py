# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine as an asyncio program sees it.

The event loop watches the engine's socket; each wake drains all steps that are there and resolves
at most one future a stream.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

from llmserve.config.engine import EngineConfig
from llmserve.core.messages import (
    EngineLost,
    EngineOutputs,
    EngineReady,
    ModelInfo,
    SchedulerStats,
    UtilityCall,
    UtilityResult,
)
from llmserve.core.outputs import Delta, Logprob, RequestOutput
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.client import EngineClient
from llmserve.engine.launch import EngineProcess, launch_engine
from llmserve.errors import EngineDeadError, EngineError
from llmserve.frontend.input_processor import InputProcessor, Prompt
from llmserve.frontend.output_processor import (
    LOGPROB_BYTES,
    Gathered,
    OutputProcessor,
    Request,
    RequestObserver,
)
from llmserve.frontend.parsed_text import Parsing
from llmserve.frontend.tokenizer import Tokenizer

_WATCH_S = 0.5  # between looks at whether our own engine lives
_TOKENS_HELD = 32  # of 150,000 log-probabilities each: 77 MB


class RequestStream:
    """One request's news. Whoever holds it calls `abort` in a `finally`."""

    def __init__(self, request: Request, processor: OutputProcessor) -> None:
        self._request = request
        self._processor = processor
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()  # asked once: it costs a system call
        request.on_news = self._wake

    @property
    def request_id(self) -> str:
        """As given to `submit`."""
        return self._request.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self._request.prompt_token_ids

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens out of the prefix cache; known with the first token."""
        return self._request.num_cached_tokens

    @property
    def num_preemptions(self) -> int:
        """How often the engine took its memory back, over all continuations."""
        return self._request.num_preemptions

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """One entry a prompt token (the first None), complete with the first token; or None."""
        return self._request.prompt_logprobs(None)

    @property
    def num_prompt_logprobs(self) -> int:
        """How many `prompt_logprobs` has."""
        return self._request.params.num_prompt_logprobs(len(self.prompt_token_ids))

    @property
    def finished(self) -> bool:
        """Whether all was taken and nothing more will come."""
        request = self._request
        return request.finished and not request.news and request.error is None

    async def next(self) -> list[Delta]:
        """What is new, one Delta a continuation, waiting until something is.

        Empty once the request is finished. Raises the LLMServeError that ended it.
        """
        request = self._request
        while not request.news and request.error is None and not request.finished:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return request.take()

    def bound(self, max_held_bytes: int) -> None:
        """Ends the request where more than about this much is left untaken of a continuation; or
        than the log-probabilities of its prompt and of some tokens, in whose writing more comes."""
        each = 1 + (self._request.params.logprobs or 0)
        least = LOGPROB_BYTES * (self.num_prompt_logprobs + _TOKENS_HELD * each)
        self._request.max_held_bytes = max(max_held_bytes, least)

    def abort(self) -> None:
        """Stops what still runs; idempotent."""
        self._processor.abort(self._request)
        self._wake()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> list[Delta]:
        deltas = await self.next()
        if not deltas:
            raise StopAsyncIteration
        return deltas

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM:
    """Requests in, streams out. Used from one event loop.

    `dead` is why no more will be served; `lost` is why nothing is served until the next engine is
    ready.
    """

    def __init__(
        self,
        client: EngineClient,
        model: ModelInfo,
        *,
        tokenizer: Tokenizer | None,
        input_processor: InputProcessor,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.input_processor = input_processor
        self.dead: EngineDeadError | None = None
        self.lost: EngineDeadError | None = None
        self._client = client
        self._processor = OutputProcessor(client, tokenizer)
        self._processor.stats = _idle(model)
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: EngineProcess | None = None
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def launch(
        cls,
        model: str = "",
        *,
        chat_template: str | None = None,
        default_chat_template_kwargs: dict[str, Any] | None = None,
        **flags: Any,
    ) -> "AsyncLLM":
        """Starts an engine process of its own, which `shutdown` ends; every engine flag is a
        keyword. ConfigError for what cannot be served."""
        config = EngineConfig.from_flags(model=model, **flags)
        engine = launch_engine(config)
        client = engine.connect(0)
        try:
            info = await asyncio.to_thread(engine.wait_ready, client)
            front = InputProcessor.for_model(
                info,
                config.model,
                chat_template=chat_template,
                default_template_kwargs=default_chat_template_kwargs or {},
            )
        except BaseException:  # boundary: what was started must not outlive the failure
            client.close()
            engine.shutdown()
            raise
        llm = cls(client, info, tokenizer=front.tokenizer, input_processor=front)
        llm._engine = engine
        llm.start()
        llm._watcher = asyncio.create_task(llm._watch(engine))
        return llm

    async def _watch(self, engine: EngineProcess) -> None:
        while engine.alive():
            await asyncio.sleep(_WATCH_S)
        self._on_readable()
        self._die("the engine process ended" if self.lost is None else self.lost.message)

    @property
    def stats(self) -> SchedulerStats:
        """As of the last step heard of."""
        return self._processor.stats

    @property
    def num_dropped_frames(self) -> int:
        """Messages from the engine that were none."""
        return self._client.num_dropped_frames

    @property
    def observer(self) -> RequestObserver | None:
        """Who hears of requests as they go."""
        return self._processor.observer

    @observer.setter
    def observer(self, observer: RequestObserver | None) -> None:
        self._processor.observer = observer

    @property
    def num_restarts(self) -> int:
        """Engines that there were before this one."""
        return self._client.engine

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's step loop last showed that it gets on."""
        return self._client.heartbeat.age

    def is_late(self, timeout: float) -> bool:
        """Whether the engine's next sign is overdue by `timeout` seconds."""
        return self._client.heartbeat.late(timeout)

    @property
    def num_unfinished(self) -> int:
        """Engine requests in flight."""
        return self._processor.num_unfinished

    def start(self) -> None:
        """Listens to the engine on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._client.fileno(), self._on_readable)
        self._on_readable()  # the descriptor is edge-triggered: what is there already is no edge

    def shutdown(self) -> None:
        """Stops listening; requests in flight end with EngineDeadError. Ends the engine if `launch`
        started it. Idempotent."""
        if self._loop is not None:
            self._loop.remove_reader(self._client.fileno())
            self._loop = None
        self._die("the server is shutting down")
        self.input_processor.close()
        if self._engine is not None:
            assert self._watcher is not None
            self._watcher.cancel()
            self._client.close()
            self._engine.shutdown()
            self._engine = None

    async def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str,
        prompt_text: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        parsing: Parsing | None = None,
    ) -> RequestStream:
        """Sends a request that the input processor has checked."""
        self._check_engine()
        request = Request(request_id, prompt_token_ids, params, prompt_text, parsing)
        stream = RequestStream(request, self._processor)
        self._processor.submit(request, priority=priority, cache_salt=cache_salt)
        return stream

    def _check_engine(self) -> None:
        if self.dead is not None:
            raise self.dead
        if self.lost is not None:  # what it said of its end is for the log alone
            raise EngineDeadError("The engine is being restarted.", code=self.lost.code)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Everything so far, again and again as it grows. Leaving the loop early aborts it."""
        text, ids = await self.input_processor.read_prompt(prompt)
        params = self.input_processor.check_params(sampling_params, prompt_len=len(ids))[0]
        stream = await self.submit(
            ids,
            params,
            request_id=request_id,
            prompt_text=text,
            priority=priority,
            cache_salt=cache_salt,
        )
        self._streams[request_id] = stream
        gathered = Gathered(stream._request, self.tokenizer)
        try:
            async for deltas in stream:
                gathered.add(deltas)
                yield gathered.output()
        finally:
            stream.abort()
            self._streams.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """Ends a `generate` from outside; its iterator stops. Unknown ids are ignored."""
        if (stream := self._streams.get(request_id)) is not None:
            stream.abort()

    async def call(self, method: str, *args: Any) -> Any:
        """A rare operation of the engine by name (`reset_prefix_cache`, `ping`)."""
        self._check_engine()
        call_id = next(self._call_ids)
        future = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._client.send(UtilityCall(self._client.index, call_id, method, list(args)))
            return await future
        finally:
            del self._calls[call_id]

    async def reset_prefix_cache(self) -> bool:
        """Whether the cache could be emptied (not while requests run)."""
        return bool(await self.call("reset_prefix_cache"))

    def _on_readable(self) -> None:
        steps: list[EngineOutputs] = []
        for message in self._client.receive():
            if isinstance(message, EngineOutputs):
                if self.lost is None:  # else late words of the engine that was lost
                    steps.append(message)
            elif isinstance(message, UtilityResult):
                self._answer(message)
            elif isinstance(message, EngineReady):
                self._recover(message)
            else:
                self._processor.process(steps)
                steps = []
                if isinstance(message, EngineLost):
                    self._change_engine(message)
                elif message.engine < 0:
                    self._die(message.message)
                elif message.engine == self._client.engine:  # and another one may come
                    self._lose(EngineDeadError(message.message, code="engine_dead"))
        if steps:
            self._processor.process(steps)

    def _lose(self, error: EngineDeadError) -> None:
        self.lost = error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError("The engine was lost.", code=error.code))

    def _change_engine(self, message: EngineLost) -> None:
        code = "engine_hung" if message.hung else "engine_dead"
        self._lose(EngineDeadError(message.message, code=code))
        self._client.reconnect(message.engine)
        self._processor.stats = _idle(self.model)
        self._processor.change_engine(
            EngineDeadError("The engine was restarted; this request was lost with it.")
        )

    def _recover(self, message: EngineReady) -> None:
        if message.engine > self._client.engine:  # we were stuck when the one before was lost
            self._change_engine(EngineLost("the engine was restarted", message.engine))
        if message.engine == self._client.engine:
            self.lost = None
            self.model = message.model

    def _answer(self, result: UtilityResult) -> None:
        future = self._calls.get(result.call_id)
        if future is None or future.done():
            return
        if result.error is not None:
            future.set_exception(EngineError(result.error))
        else:
            future.set_result(result.value)

    def _die(self, message: str) -> None:
        self.dead = self.dead or EngineDeadError(message)
        self._processor.fail_all(self.dead)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self.dead)


def _idle(model: ModelInfo) -> SchedulerStats:
    blocks = model.num_kv_blocks
    return SchedulerStats(num_blocks_total=blocks, num_blocks_free=blocks)
