# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The API on a scripted engine: everything above the engine's socket is real."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmserve.api.app import build_app
from llmserve.api.state import AppState
from llmserve.config.server import ServerConfig
from llmserve.core.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutputs,
    EngineRequest,
    FinishReason,
    FromEngine,
    LogprobColumns,
    ModelInfo,
    RequestExtra,
    SchedulerStats,
    ToEngine,
)
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.chat_template import ChatTemplate
from llmserve.frontend.input_processor import InputProcessor
from llmserve.frontend.tokenizer import Tokenizer
from tests.helpers.frontend import FakeHeartbeat

MODEL = "org/tiny"
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, ids 0..255, then <s> 256 and </s> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


TOKENIZER = byte_tokenizer()


def model_info(**changes: Any) -> ModelInfo:
    """A model of CONTEXT tokens whose logits are wider than its vocabulary."""
    fields: dict[str, Any] = {
        "name": MODEL,
        "architecture": "Tiny",
        "max_model_len": CONTEXT,
        "logits_width": 264,
        "eos_token_ids": [257],
        "bos_token_id": 256,
        "tokenizer": "",
        "chat_template": TEMPLATE,
        "generation_defaults": {},
        "dtype": "float32",
        "num_kv_tokens": 4096,
        "num_kv_blocks": 256,
        "block_size": 16,
        "weight_bytes": 0,
        "kv_specs": [],
        "max_num_batched_tokens": 64,
        "fingerprint": "llmserve-test-fp",
        "cache_config": {"block_size": "16", "num_gpu_blocks": "256"},
    }
    return ModelInfo(**(fields | changes))


class ScriptedEngine:
    """An EngineClient whose engine says `answer(request)`, `step` tokens at a time.

    With `hold` set nothing is said until `release`. A request whose answer is longer than its
    max_tokens ends with "length".
    """

    index = 0
    num_dropped_frames = 0

    def __init__(self) -> None:
        self.answer: Callable[[EngineRequest], str] = lambda request: "Hello, world!"
        self.engine = 0
        self.heartbeat = FakeHeartbeat()
        self.step = 1
        self.delay = 0.0
        self.one_by_one = False  # one step at a time: no two are merged
        self.hold = False
        self.fail_at: int | None = None  # after this many tokens
        self.failure = RequestExtra(finish_reason="error", error="numerical_error", message="NaN")
        self.requests: list[EngineRequest] = []
        self.aborted: list[int] = []
        self.num_late = 0  # delayed steps that were said
        self.stats = SchedulerStats(num_blocks_total=256, num_blocks_free=250, num_blocks_cached=2)
        self._held: list[EngineRequest] = []
        self._messages: list[FromEngine] = []
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def receive(self) -> list[FromEngine]:
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        count = 1 if self.one_by_one else len(self._messages)
        messages, self._messages = self._messages[:count], self._messages[count:]
        if self._messages:
            self._arm(30)
        return messages

    def _arm(self, turns: int) -> None:
        """Readable again after `turns` turns of the loop, in which all readers get their news."""
        if turns:
            asyncio.get_running_loop().call_soon(self._arm, turns - 1)
        else:
            os.eventfd_write(self._fd, 1)

    def push(self, message: FromEngine) -> None:
        """The engine says `message`."""
        self._messages.append(message)
        os.eventfd_write(self._fd, 1)

    def send(self, message: ToEngine) -> None:
        if isinstance(message, EngineRequest):
            self.requests.append(message)
            if self.hold:
                self._held.append(message)
            else:
                self.play(message)
        elif isinstance(message, AbortRequests):
            self.aborted += message.request_ids

    def release(self) -> None:
        """Plays what was held."""
        held, self._held = self._held, []
        self.hold = False
        for message in held:
            self.play(message)

    def reconnect(self, engine: int) -> None:
        self.engine = engine

    def die(self) -> None:
        """The supervisor's word that the engine is gone."""
        self.push(EngineFailed("the engine process ended", False))

    def play(self, request: EngineRequest) -> None:
        steps = self.steps(request)
        if not self.delay:
            for step in steps:
                self.push(step)
            return
        loop = asyncio.get_running_loop()
        for index, step in enumerate(steps):
            loop.call_later(self.delay * (index + 1), self._late, request.request_id, step)

    def _late(self, request_id: int, step: EngineOutputs) -> None:
        self.num_late += 1
        if request_id not in self.aborted:
            self.push(step)

    def steps(self, request: EngineRequest) -> list[EngineOutputs]:
        """All messages of one request."""
        tokens = TOKENIZER.encode(self.answer(request), add_special_tokens=False)
        limit = request.params.max_tokens
        reason: FinishReason = "stop"
        if limit is not None and len(tokens) >= limit:
            tokens, reason = tokens[:limit], "length"
        else:
            tokens = [*tokens, 257]
        if self.fail_at is not None:
            tokens = tokens[: self.fail_at]
        steps = []
        cuts = list(range(0, len(tokens), self.step)) or [0]
        for start in cuts:
            some = tokens[start : start + self.step]
            extra = RequestExtra()
            if start == 0:
                extra.num_cached_tokens, extra.queue_time = 3, 0.001
                if request.params.prompt_logprobs is not None:
                    prompt = request.prompt_token_ids.tolist()
                    extra.prompt_logprobs = columns(prompt[1:], request.params.prompt_logprobs)
            if request.params.logprobs is not None:
                extra.logprobs = columns(some, request.params.logprobs)
            if start == cuts[-1] and self.fail_at is None:
                extra.finish_reason = reason
                extra.stop_reason = None
            self.stats.num_steps += 1
            self.stats.num_tokens_computed += len(some)
            steps.append(output(request.request_id, some, extra, self.stats))
        if self.fail_at is not None:
            steps.append(output(request.request_id, [], self.failure, self.stats))
        return steps


def columns(tokens: list[int], k: int) -> LogprobColumns:
    """Made up, but told apart: token t has -t/100, its j-th alternative (t + j) % 256 has -j."""
    ids = np.array([[t, *((t + j) % 256 for j in range(1, k + 1))] for t in tokens], np.int32)
    values = np.array([[-t / 100, *(-float(j) for j in range(1, k + 1))] for t in tokens])
    ids, values = ids.reshape(len(tokens), k + 1), values.reshape(len(tokens), k + 1)
    return LogprobColumns.pack(ids, values, np.ones(len(tokens), np.int32))


def output(
    request_id: int, tokens: list[int], extra: RequestExtra | None, stats: SchedulerStats
) -> EngineOutputs:
    """One step with news of one request."""
    return EngineOutputs(
        ids=np.full(len(tokens), request_id, np.uint32).tobytes(),
        tokens=np.array(tokens, np.int32).tobytes(),
        extras={} if extra is None else {request_id: extra},
        stats=stats,
    )


def make_llm(
    engine: ScriptedEngine, model: ModelInfo | None = None, template: str = TEMPLATE
) -> AsyncLLM:
    """A real AsyncLLM on the scripted engine; started on the running loop."""
    model = model or model_info()
    processor = InputProcessor(
        model,
        TOKENIZER,
        ChatTemplate(template, TOKENIZER.special_tokens),
        max_logprobs=20,
        default_template_kwargs={},
    )
    llm = AsyncLLM(engine, model, tokenizer=TOKENIZER, input_processor=processor)  # type: ignore[arg-type]
    llm.start()
    return llm


class Api:
    """Client, engine and state of one app without a socket."""

    def __init__(self, state: AppState, engine: ScriptedEngine, client: httpx.AsyncClient) -> None:
        self.state = state
        self.engine = engine
        self.client = client
        self.app = client._transport.app  # type: ignore[attr-defined]

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **kwargs)

    async def chat(self, content: Any = "hi", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields
        return await self.post("/v1/chat/completions", body)

    async def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return await self.post(
            "/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 50} | fields
        )


@asynccontextmanager
async def open_api(
    ready: bool = True, names: Iterable[str] = (), template: str = TEMPLATE, **server: Any
) -> AsyncIterator[Api]:
    """An Api; `server` are ServerConfig's fields."""
    state = AppState(ServerConfig(**server), list(names))
    engine = ScriptedEngine()
    llm = make_llm(engine, template=template)
    if ready:
        state.attach(llm)
    transport = httpx.ASGITransport(build_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield Api(state, engine, client)
    llm.shutdown()
    engine.close()


def events(text: str) -> list[Any]:
    """The events of a stream; "[DONE]" stays a string, comments are left out."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert not block or block.startswith(":"), block
    return found
