# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One HTTP connection: what its client may send, how slowly, and how slowly it may read.

uvicorn parses; what it leaves unbounded is bounded here: the bytes and number of headers, the time
that a request takes to arrive, the time that an answer waits in a full socket, and connections.
"""

import asyncio
import http
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from llmserve.api.errors import HttpError, error_body
from llmserve.errors import LLMServeError, OverloadedError

MAX_HEADER_BYTES = 64 << 10  # request line, headers and trailers of one request
MAX_HEADERS = 256
_BODY_BYTES_S = 16 << 10  # a body may come this slowly, once the read timeout has passed
_PROGRESS_BYTES = 16 << 10  # read by the client within one write timeout, or it is cut off


_LINGER_S = 1.0  # a client that still sends would lose its answer if the socket were closed at once


class _Transport:
    """Closed in the middle of a request, it takes in what still comes for a while."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._lingers = False
        self.in_request = False
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more is read from or written to it."""
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        """Sends what is written, at its end."""
        if self._lingers or not self.in_request or self._transport.is_closing():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(_LINGER_S, self._transport.close)


class _Refused(Exception):
    """Ends the parsing of a request."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Times in seconds. `refused` hears why a request or a connection was ended."""

    read_timeout: float
    write_timeout: float
    max_connections: int
    refused: Callable[[str], None]


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's connection within `ConnectionLimits`."""

    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._in_head = True
        self._head_bytes = 0
        self._num_headers = 0
        self._body_bytes = 0
        self._began = 0.0
        self._unsent = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection past the last one that there are descriptors for is told so and closed."""
        self._linger = _Transport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._linger))
        self._arm_read()
        if len(self.connections) > self._limits.max_connections:
            self._refuse("connections", OverloadedError("Too many connections are open."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing of it stays."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    # -- what the client sends

    def data_received(self, data: bytes) -> None:
        """Counts the head of a request as it arrives."""
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self._too_large()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = self._linger.in_request = True
        self._num_headers = self._body_bytes = 0
        self._arm_read()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers count, and are not kept."""
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise _Refused
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application starts."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEADER_BYTES:
            raise _Refused
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._in_head = True
        self._linger.in_request = False
        if self._reading is not None:
            self._reading.cancel()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up, or one of the callbacks above did."""
        if self._num_headers > MAX_HEADERS or (
            self._in_head and self._head_bytes > MAX_HEADER_BYTES
        ):
            self._too_large()
        else:
            self._refuse("bad_http", HttpError(400, "This is no valid HTTP request."))

    def _too_large(self) -> None:
        text = f"The headers are larger than {MAX_HEADER_BYTES} bytes or more than {MAX_HEADERS}."
        self._refuse("headers_too_large", HttpError(431, text, code="headers_too_large"))

    def _arm_read(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._began = self.loop.time()
        self._reading = self.loop.call_later(self._limits.read_timeout, self._look_at_reading)

    def _look_at_reading(self) -> None:
        left = self._began + self._limits.read_timeout - self.loop.time()
        left += 0 if self._in_head else self._body_bytes / _BODY_BYTES_S
        if left > 0.001:
            self._reading = self.loop.call_later(left, self._look_at_reading)
        elif self._in_head and not self._head_bytes:
            self.transport.close()  # a connection that nothing was asked on
        else:
            text = "The request took too long to arrive."
            self._refuse("slow_request", HttpError(408, text, code="request_timeout"))

    def _refuse(self, reason: str, error: LLMServeError) -> None:
        """Answers for the application where no answer has begun, and closes."""
        if self.transport.is_closing():
            return
        self._limits.refused(reason)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and (self._in_head or self.cycle.response_started):
            self.transport.abort()  # an answer is under way: nothing may be written into it
            return
        body = error_body(error)
        head = (
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {uuid.uuid4().hex}\r\nconnection: close\r\n"
        )
        if isinstance(error, OverloadedError):
            head += f"retry-after: {error.retry_after}\r\n"
        self.transport.write(head.encode() + b"\r\n" + body)
        self.transport.close()
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    # -- what the client reads

    def pause_writing(self) -> None:
        """The socket is full, and so is the transport's buffer."""
        super().pause_writing()
        self._arm_write()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()

    def on_response_complete(self) -> None:
        """An answer that is written but not read keeps its connection no longer than others."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._arm_write()

    def timeout_keep_alive_handler(self) -> None:
        """A connection that idles with an answer unread never closes by itself."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _arm_write(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        self._unsent = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(self._limits.write_timeout, self._look_at_writing)

    def _look_at_writing(self) -> None:
        size = self.transport.get_write_buffer_size()
        if size and size > self._unsent - _PROGRESS_BYTES:
            self._limits.refused("slow_reader")
            self.transport.abort()
        elif size:
            self._arm_write()
