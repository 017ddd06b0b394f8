# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Server-sent events: framing, keep-alive, failure in the middle, client gone.

The status line waits for the first news of the engine, so that a refused request is a real error
status; a silent engine gets it after one keep-alive interval. While a socket is full, `send` waits
and the deltas behind it are merged by their RequestStream: a slow reader gets fewer, larger chunks,
and one for whom too much is held is given up.
"""

import asyncio
from typing import Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from llmserve.api.errors import ClientGone, error_event, error_response, internal_error
from llmserve.api.generation import Generation, Pace
from llmserve.api.logprobs import write
from llmserve.api.state import AppState
from llmserve.core.outputs import Delta
from llmserve.errors import LLMServeError
from llmserve.frontend.async_llm import RequestStream
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
MAX_HELD_BYTES = 64 << 10  # with what socket and connection buffer, 256 KiB a stream
_LEAST_HELD_BYTES = 8 << 10  # of one continuation among many
# NEL, LINE and PARAGRAPH SEPARATOR: many clients end a line there, which would cut the JSON.
_LINE_ENDS = tuple((char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029")
RAW_SEND = "llmserve.send"  # in the scope: the server's own send, past all middleware


class EventWriter(Protocol):
    """Turns deltas into events, at times in a thread. Made once a stream."""

    def num_logprobs(self, deltas: list[Delta]) -> int:
        """How many log-probabilities `events` is to write for them."""
        ...

    def events(self, deltas: list[Delta]) -> bytes:
        """Framed events for what is new; may be empty."""
        ...

    def tail(self) -> bytes:
        """What follows the last delta, without the end marker."""
        ...


class EventStream(Response):
    """A generation as server-sent events. Aborts it whenever it ends early."""

    media_type = "text/event-stream"

    def __init__(
        self,
        state: AppState,
        generation: Generation,
        writer: EventWriter,
        pace: Pace,
        headers: dict[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._state = state
        self._generation = generation
        for stream in generation.streams:
            most = MAX_HELD_BYTES // (generation.n * len(generation.streams))
            if isinstance(stream, RequestStream):  # a beam search says nothing before its end
                stream.bound(max(most, _LEAST_HELD_BYTES))
        self._writer = writer
        self._pace = pace
        self._started = False
        self._busy = False
        self._last_write = 0.0
        self._loop = asyncio.get_running_loop()  # asked once: it costs a system call
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None
        self.init_headers(
            headers | {"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until the generation, the client or the server ends."""
        raw_send: Send = scope.get(RAW_SEND, send)
        try:
            await self._state.watched(receive, self._run(send, raw_send))
        except ClientGone:
            return
        except LLMServeError as error:
            await self._fail(error, scope, receive, send)
        except Exception:  # boundary: a started stream must end with an event, not a broken body
            logger.exception("a stream failed")
            await self._fail(internal_error(), scope, receive, send)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._generation.abort()

    async def _run(self, send: Send, raw_send: Send) -> None:
        interval = self._state.server.sse_keep_alive_interval
        first = asyncio.ensure_future(self._generation.next())
        try:
            await asyncio.wait({first}, timeout=interval or None)
            if not first.done() or first.exception() is None:
                await self._start(send)
            if interval:
                self._timer = self._loop.call_later(interval, self._keep_alive, interval, raw_send)
            deltas = await first
        finally:
            first.cancel()
        while True:
            deltas = self._pace.take(deltas)
            number = self._writer.num_logprobs(deltas)
            data = await write(number, self._writer.events, deltas)
            if not self._generation.remaining:
                break
            if data:
                await self._write(raw_send, data)
            deltas = await self._generation.next()
        await self._end(raw_send, data + self._writer.tail() + DONE)

    async def _start(self, send: Send) -> None:
        self._started = True
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )

    async def _write(self, send: Send, data: bytes) -> None:
        self._busy = True
        body = _escaped(data)
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._busy = False
        self._last_write = self._loop.time()

    async def _end(self, send: Send, data: bytes) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
        body = _escaped(data)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _keep_alive(self, interval: float, send: Send) -> None:
        loop = self._loop
        wait = self._last_write + interval - loop.time()
        if wait <= 0:
            wait = interval
            if not self._busy:
                self._comment = loop.create_task(self._write(send, KEEP_ALIVE))
        self._timer = loop.call_later(wait, self._keep_alive, interval, send)

    async def _fail(self, error: LLMServeError, scope: Scope, receive: Receive, send: Send) -> None:
        if self._started:
            await self._end(send, error_event(error))
        else:
            self._started = True
            await error_response(error)(scope, receive, send)


def _escaped(data: bytes) -> bytes:
    """Events whose only line ends are their own."""
    if data.isascii():
        return data
    for raw, escape in _LINE_ENDS:
        if raw in data:
            data = data.replace(raw, escape)
    return data
