# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A cheap streaming HTTP client: a load generator must not be what it measures."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from llmserve.cli.client import error_message, split_url
from llmserve.errors import LLMServeError


@dataclass(frozen=True)
class Target:
    """Where requests go, and the headers that they all have."""

    host: str
    port: int
    path: str
    authority: str
    tls: bool
    headers: str

    @classmethod
    def make(cls, base_url: str, endpoint: str, api_key: str | None) -> "Target":
        """From `http://host:port` and `/v1/completions`."""
        parts, host, port = split_url(base_url, "--base-url")
        tls = parts.scheme == "https"
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        return cls(
            host, port,
            parts.path.rstrip("/").removesuffix("/v1") + "/" + endpoint.lstrip("/"),
            parts.netloc.rpartition("@")[2], tls, key,
        )  # fmt: skip


async def post_events(target: Target, body: bytes) -> AsyncIterator[bytes]:
    """POSTs JSON; the data of each server-sent event as it arrives, `[DONE]` left out.

    LLMServeError with the server's message for a status other than 200, OSError for the network's.
    """
    reader, writer = await asyncio.open_connection(
        target.host, target.port, ssl=target.tls or None, limit=1 << 22
    )
    try:
        writer.write(
            f"POST {target.path} HTTP/1.1\r\nHost: {target.authority}\r\n{target.headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Accept: text/event-stream\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        status = await reader.readline()
        if not status:
            raise ConnectionResetError("the server closed the connection")
        chunked = False
        while (line := (await reader.readline()).strip().lower()) != b"":
            chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
        data = _chunks(reader) if chunked else _rest(reader)
        if status.split()[1:2] != [b"200"]:
            text = b"".join([part async for part in data]).decode(errors="replace")
            raise LLMServeError(f"{status.decode().strip()[9:]}: {error_message(text)}")
        async for event in _events(data):
            yield event
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the server ended the stream early") from None
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 16):
        yield data


async def _events(data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    buffer = b""
    async for part in data:
        buffer = (buffer + part).replace(b"\r\n", b"\n")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield event[6:]
