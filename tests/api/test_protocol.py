# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Connections of clients that mean no good, on a real socket."""

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from llmserve.api import server as api_server
from llmserve.api.protocol import MAX_HEADER_BYTES, MAX_HEADERS
from llmserve.config.server import ServerConfig
from llmserve.frontend.async_llm import AsyncLLM
from tests.helpers.api import ScriptedEngine, make_llm, model_info

JSON = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


class Served:
    """A served API whose connections are made by hand."""

    def __init__(self, **config: Any) -> None:
        self.engine = ScriptedEngine()
        self.model = model_info(max_model_len=100_000)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.refused: list[str] = []
        config = {"disable_uvicorn_access_log": True} | config
        self.task = asyncio.ensure_future(
            api_server.serve(ServerConfig(**config), self.sock, self._connect)
        )

    async def _connect(self) -> AsyncLLM:
        return make_llm(self.engine, self.model)

    async def open(
        self, data: bytes = b"", receive_buffer: int = 1 << 18
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(data)
        return reader, writer

    async def ask(self, data: bytes) -> tuple[int, str]:
        """Status and error code of the only answer, after which the server must hang up."""
        reader, writer = await self.open(data)
        answer = b""
        with suppress(ConnectionResetError):
            answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"connection: close" in head and b"x-request-id" in head, answer[:400]
        return int(head.split()[1]), json.loads(body)["error"]["code"]

    async def answers(self) -> None:
        """The server still does."""
        for _ in range(100):
            with suppress(ConnectionError):
                reader, writer = await self.open(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                line = await asyncio.wait_for(reader.readline(), 10)
                writer.close()
                if b" 200 " in line:
                    return
            await asyncio.sleep(0.02)
        raise AssertionError("it no longer answers")

    async def refusals(self, reason: str) -> int:
        reader, writer = await self.open(
            b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        )
        page = (await reader.read()).decode()
        writer.close()
        (line,) = (
            x for x in page.splitlines() if f'llmserve:refused_total{{reason="{reason}"' in x
        )
        return int(float(line.split()[-1]))


@asynccontextmanager
async def served(**config: Any) -> AsyncIterator[Served]:
    server = Served(**config)
    await server.answers()
    yield server
    await server.answers()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(server.task, 10)
    server.engine.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * MAX_HEADER_BYTES + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 3 * MAX_HEADER_BYTES,  # no end
        b"GET /" + b"a" * 2 * MAX_HEADER_BYTES,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
    ],
)
async def test_a_head_that_is_too_large_is_431(head: bytes) -> None:
    async with served() as server:
        assert await server.ask(head) == (431, "headers_too_large")
        assert await server.refusals("headers_too_large") == 1


async def test_a_head_of_just_the_size_passes() -> None:
    async with served() as server:
        fields = b"".join(b"a%d: b\r\n" % i for i in range(MAX_HEADERS - 3))
        value = b"c" * (MAX_HEADER_BYTES - 8000)
        reader, writer = await server.open(
            b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nz: %b\r\n%b\r\n"
            % (value, fields)
        )
        assert b" 200 " in await reader.readline()
        writer.close()


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\x00" * 100])
async def test_what_is_no_http_is_a_400_of_ours(junk: bytes) -> None:
    async with served() as server:
        assert await server.ask(junk) == (400, None)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nhost: local",
        JSON + b"content-length: 100\r\n\r\n{",
        JSON + b"transfer-encoding: chunked\r\n\r\nff\r\n{",
    ],
)
async def test_a_request_that_does_not_arrive_is_408(start: bytes) -> None:
    async with served(read_timeout=0.3) as server:
        reader, writer = await server.open(start)
        drip = asyncio.ensure_future(drips(writer))
        answer = await asyncio.wait_for(reader.read(), 10)
        drip.cancel()
        writer.close()
        assert b" 408 " in answer.splitlines()[0] and b'"request_timeout"' in answer
        assert await server.refusals("slow_request") == 1


async def drips(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b" ")
        await asyncio.sleep(0.05)


async def test_a_connection_that_asks_nothing_is_closed_without_a_word() -> None:
    async with served(read_timeout=0.2) as server:
        reader, writer = await server.open()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_a_large_body_has_longer() -> None:
    async with served(read_timeout=0.3) as server:
        reader, writer = await server.open(JSON + b"content-length: 40000\r\n\r\n")
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode().ljust(40_000)
        for start in range(0, 40_000, 5000):  # 0.8 s in all
            writer.write(body[start : start + 5000])
            await asyncio.sleep(0.1)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        writer.close()


async def test_more_connections_than_descriptors_are_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api_server, "_connections", lambda: 5)
    async with served() as server:
        kept = [await server.open() for _ in range(5)]
        await asyncio.sleep(0.1)
        status, code = await server.ask(b"")
        assert (status, code) == (503, "server_is_overloaded")
        for _, writer in kept:
            writer.close()
        await asyncio.sleep(0.1)
        await server.answers()
        assert await server.refusals("connections") >= 1


@pytest.mark.parametrize("stream", [True, False])
async def test_who_stops_reading_is_cut_off_and_its_request_ends(stream: bool) -> None:
    async with served(write_timeout=0.4) as server:
        server.engine.answer = lambda request: "0123456789" * 9_000
        server.engine.step, server.engine.delay = 100, 1e-3
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "hi"}],
                "stream": stream,
                "max_tokens": 95_000,
                "logprobs": True,
            }
        ).encode()
        data = JSON + b"content-length: %d\r\n\r\n" % len(body) + body
        reader, writer = await server.open(data, receive_buffer=4096)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while not await server.refusals("slow_reader") or (
                stream and not server.engine.aborted
            ):
                await asyncio.sleep(0.05)
        assert await server.refusals("slow_reader") == 1
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionError):
            assert b"[DONE]" not in await asyncio.wait_for(reader.read(), 30)
        writer.close()


async def test_a_client_that_vanishes_in_its_body_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as server:
        _, writer = await server.open(JSON + b"content-length: 1000\r\n\r\n{")
        await asyncio.sleep(0.1)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        await asyncio.sleep(0.1)
    assert "Traceback" not in caplog.text and "failed" not in caplog.text


async def test_pipelined_junk_does_not_write_into_an_answer() -> None:
    async with served() as server:
        server.engine.hold = True
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        reader, writer = await server.open(
            JSON + b"content-length: %d\r\n\r\n" % len(body) + body + b"\x00\x01junk\r\n\r\n"
        )
        answer = b""
        with suppress(ConnectionError):
            answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer == b""
