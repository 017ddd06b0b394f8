# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import asyncio
from collections.abc import Awaitable, Callable

import pytest

from llmserve.cli.bench.http import Target, post_events
from llmserve.errors import ConfigError, LLMServeError

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def events_of(raw: list[bytes]) -> tuple[list[bytes], bytes]:
    """What `post_events` yields for a server that writes `raw` piece by piece; and the request."""
    request = b""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal request
        request = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)
        for part in raw:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.002)
        writer.close()
        done.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        target = Target.make(f"http://127.0.0.1:{port}/base/", "/v1/completions", "key")
        try:
            events = [event async for event in post_events(target, b"{}")]
        finally:
            await done.wait()
            await asyncio.sleep(0.01)  # both ends close
    return events, request


STREAM = b'data: {"a": 1}\n\n: comment\n\ndata: {"b": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(data: bytes, size: int) -> bytes:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("pieces", [1, 3, 50])
async def test_events_survive_every_split(size: int, pieces: int) -> None:
    raw = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM, size)
    step = -(-len(raw) // pieces)
    events, request = await events_of([raw[i : i + step] for i in range(0, len(raw), step)])
    assert events == [b'{"a": 1}', b'{"b": "\xc3\xa9"}']
    assert request.startswith(b"POST /base/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Authorization: Bearer key\r\n" in request and request.endswith(b"\r\n\r\n{}")


async def test_without_chunks_and_with_crlf() -> None:
    events, _ = await events_of([HEAD + b"\r\n" + STREAM.replace(b"\n", b"\r\n")])
    assert len(events) == 2


async def test_failures() -> None:
    body = b'{"error": {"message": "too long"}}'
    with pytest.raises(LLMServeError, match="400 Bad Request: too long"):
        await events_of(
            [b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)]
        )
    cut = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"ff\r\ndata: {"
    with pytest.raises(ConnectionResetError, match="ended the stream early"):
        await events_of([cut])
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        await events_of([])
    with pytest.raises(ConfigError, match="--base-url must look like"):
        Target.make("localhost:8000", "/v1", None)


def test_target_knows_ports() -> None:
    assert Target.make("https://host", "/v1", None).port == 443
    assert Target.make("http://host", "/v1", None).port == 80


def test_target_takes_a_base_with_v1_and_a_route_without_slash() -> None:
    for base, route in (("http://h:1/v1", "/v1/completions"), ("http://h:1/", "v1/completions")):
        assert Target.make(base, route, None).path == "/v1/completions"
    assert Target.make("http://h:1/proxy/v1", "/v1/completions", None).path[:10] == "/proxy/v1/"
    for wrong in ("http://[", "http://h:x", "h:1"):
        with pytest.raises(ConfigError, match="--base-url must look like"):
            Target.make(wrong, "/v1/completions", None)
