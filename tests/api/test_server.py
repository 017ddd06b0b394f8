# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The server on a real socket: start, drain, death, and the official client."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from llmserve.api.server import serve, wait_ready
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, EngineReady
from llmserve.errors import ConfigError, EngineError
from llmserve.frontend.async_llm import AsyncLLM
from tests.helpers.api import MODEL, ScriptedEngine, events, make_llm, model_info

MESSAGES: Any = [{"role": "user", "content": "hi"}]


class Running:
    """A served API; `ready` lets the engine come up."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = ScriptedEngine()
        self.ready = asyncio.Event()
        self.model = model_info()
        self.failure: Exception | None = None
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.task = asyncio.ensure_future(serve(config, self.sock, self._connect))
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20)
        self.sdk = AsyncOpenAI(base_url=self.url + "/v1", api_key="k", max_retries=0, timeout=20)

    async def _connect(self) -> AsyncLLM:
        await self.ready.wait()
        if self.failure is not None:
            raise self.failure
        return make_llm(self.engine, self.model)

    async def until(self, status: int, path: str = "/health") -> httpx.Response:
        for _ in range(200):
            with suppress(httpx.ConnectError):
                answer = await self.http.get(path)
                if answer.status_code == status:
                    return answer
            await asyncio.sleep(0.02)
        raise AssertionError(f"{path} never answered {status}")

    async def request(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, Any]:
        """A chat request by hand, to be read and closed by hand."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        data = json.dumps({"model": MODEL, "messages": MESSAGES} | body).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
        )
        await writer.drain()
        return reader, writer


@asynccontextmanager
async def running(ready: bool = True, **config: Any) -> AsyncIterator[Running]:
    server = Running(ServerConfig(disable_uvicorn_access_log=True, **config))
    if ready:
        server.ready.set()
        await server.until(200)
    try:
        yield server
    finally:
        await server.http.aclose()
        await server.sdk.close()
        if not server.task.done():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        with suppress(ConfigError):
            await asyncio.wait_for(server.task, 10)
        server.engine.close()


async def eventually(check: Any) -> None:
    for _ in range(200):
        if check():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def test_answers_503_until_the_engine_is_ready() -> None:
    async with running(ready=False) as server:
        answer = await server.until(503)
        assert answer.json()["error"]["code"] == "starting"
        assert answer.headers["retry-after"] == "1"
        assert (await server.http.get("/health/live")).status_code == 200
        assert (await server.http.get("/metrics")).status_code == 200
        with pytest.raises(openai.InternalServerError) as info:
            await server.sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert info.value.status_code == 503
        server.ready.set()
        await server.until(200)
        answered = await server.sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert answered.choices[0].message.content == "Hello, world!"


async def test_a_failing_start_ends_the_server_with_its_reason() -> None:
    async with running(ready=False) as server:
        await server.until(503)
        server.failure = ConfigError("no such model")
        server.ready.set()
        with pytest.raises(ConfigError, match="no such model"):
            await asyncio.wait_for(server.task, 10)


async def test_the_official_client_reads_whole_and_streamed_answers() -> None:
    async with running() as server:
        whole = await server.sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, logprobs=True, top_logprobs=2
        )
        assert [choice.message.content for choice in whole.choices] == ["Hello, world!"] * 2
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        logprobs = whole.choices[1].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [entry.token for entry in logprobs.content[:2]] == ["H", "e"]
        assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 14

        stream = await server.sdk.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts = {0: "", 1: ""}
        finishes = []
        usages = []
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finishes += [choice.finish_reason] if choice.finish_reason else []
            usages += [chunk.usage] if chunk.usage else []
        assert texts == {0: "Hello, world!", 1: "Hello, world!"}
        assert finishes == ["stop", "stop"]
        assert usages == [whole.usage]

        legacy = await server.sdk.completions.create(
            model=MODEL, prompt=["a", "bc"], n=2, logprobs=1, echo=True, max_tokens=3
        )
        assert [choice.text for choice in legacy.choices] == ["aHel", "aHel", "bcHel", "bcHel"]
        assert legacy.choices[2].logprobs is not None
        assert legacy.choices[2].logprobs.text_offset == [0, 1, 2, 3, 4]
        assert legacy.choices[2].logprobs.tokens == ["b", "c", "H", "e", "l"]

        assert [model.id async for model in server.sdk.models.list()] == [MODEL]
        assert (await server.sdk.models.retrieve(MODEL)).id == MODEL


async def test_the_official_client_raises_its_own_errors() -> None:
    async with running() as server:
        with pytest.raises(openai.NotFoundError) as missing:
            await server.sdk.chat.completions.create(model="gone", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            await server.sdk.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
        assert (wrong.value.param, wrong.value.code) == ("temperature", "decimal_above_max_value")
        server.engine.fail_at = 0
        with pytest.raises(openai.InternalServerError) as failed:
            await server.sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert failed.value.response.headers["x-should-retry"] == "false"
        server.engine.fail_at, server.engine.delay = 3, 0.02
        stream = await server.sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError) as broken:
            async for _ in stream:
                pass
        assert broken.value.code == "numerical_error"


async def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    async with running(shutdown_timeout=20) as server:
        server.engine.hold = True
        body = {"model": MODEL, "messages": MESSAGES, "stream": True}
        old = asyncio.ensure_future(server.http.post("/v1/chat/completions", json=body))
        await eventually(lambda: server.engine.requests)
        os.kill(os.getpid(), signal.SIGTERM)
        refused = await server.until(503)
        assert refused.json()["error"]["code"] == "draining"
        new = await server.http.post("/v1/chat/completions", json=body)
        assert (new.status_code, new.headers["connection"]) == (503, "close")
        assert new.json()["error"]["code"] == "draining"
        server.engine.release()
        assert events((await old).text)[-1] == "[DONE]"
        await asyncio.wait_for(server.task, 10)


@pytest.mark.parametrize("signals", [1, 2])
async def test_the_drain_ends_with_its_deadline_or_a_second_sigterm(signals: int) -> None:
    async with running(shutdown_timeout=0.3 if signals == 1 else 60) as server:
        server.engine.delay = 0.2
        server.engine.answer = lambda request: "x" * 200
        reader, writer = await server.request({"stream": True})
        whole = asyncio.ensure_future(
            server.http.post("/v1/chat/completions", json={"messages": MESSAGES})
        )
        await reader.readuntil(b"content")
        await eventually(lambda: len(server.engine.requests) == 2)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
        rest = (await asyncio.wait_for(reader.read(), 10)).decode()
        writer.close()
        assert rest.count('"error"') == 1 and "[DONE]" not in rest
        assert (await whole).json()["error"]["code"] == "draining"
        await asyncio.wait_for(server.task, 10)
        assert len(server.engine.aborted) == 2


async def test_a_dead_engine_ends_streams_with_one_error_and_turns_requests_away() -> None:
    async with running() as server:
        server.engine.delay = 0.1
        server.engine.answer = lambda request: "x" * 200
        stream = await server.sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
        await anext(aiter(stream))
        server.engine.die()
        with pytest.raises(openai.APIError) as broken:
            async for _ in stream:
                pass
        assert broken.value.code == "engine_restarted"
        refused = await server.until(503)
        assert refused.json()["error"]["code"] == "engine_dead"
        assert (await server.http.get("/health/live")).status_code == 503
        with pytest.raises(openai.InternalServerError):
            await server.sdk.chat.completions.create(model=MODEL, messages=MESSAGES)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
async def test_a_client_that_leaves_aborts_its_request(stream: bool, queued: bool) -> None:
    async with running() as server:
        server.engine.hold = queued
        server.engine.delay = 0.05
        server.engine.answer = lambda request: "x" * 200
        reader, writer = await server.request({"stream": stream, "n": 2})
        await eventually(lambda: len(server.engine.requests) == 2)
        if stream and not queued:
            await reader.readuntil(b"content")
        writer.close()
        await eventually(lambda: len(server.engine.aborted) == 2)
        assert (await server.http.get("/load")).json() == {"server_load": 0}


async def test_a_slow_reader_gets_fewer_larger_chunks_and_all_of_the_text() -> None:
    async with running(ready=False) as server:
        server.model = model_info(max_model_len=8192)
        server.ready.set()
        await server.until(200)
        server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of accepted ones too
        text = "0123456789" * 600
        server.engine.answer = lambda request: text
        server.engine.step, server.engine.delay = 2, 2e-4
        reader, writer = await server.request({"stream": True, "max_tokens": 8000})
        writer.transport.pause_reading()
        await eventually(lambda: server.engine.num_late == 3001)
        writer.transport.resume_reading()
        raw = await asyncio.wait_for(reader.readuntil(b"[DONE]"), 10)
        writer.close()
        chunks = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in raw.split(b"\n")
            if line.startswith(b"data: {")
        ]
        assert "".join(chunks) == text
        assert len(chunks) < 1500


async def test_waits_for_the_engine_and_hears_why_it_gave_up() -> None:
    engine = ScriptedEngine()
    waiting = asyncio.ensure_future(wait_ready(engine))  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    assert not waiting.done()
    engine.push(EngineReady(model_info()))
    assert (await waiting).name == MODEL and engine.engine == 0
    engine.push(EngineReady(model_info(), 2))  # of one after the one that we knew of
    assert (await wait_ready(engine)).name == MODEL and engine.engine == 2  # type: ignore[arg-type]
    for user_error, kind in ((True, ConfigError), (False, EngineError)):
        engine.push(EngineFailed("no", user_error))
        with pytest.raises(kind, match="no"):
            await wait_ready(engine)  # type: ignore[arg-type]
    engine.close()
