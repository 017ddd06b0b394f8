# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""HTTP by hand: clients that no library would be."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterable
from urllib.parse import urlsplit

import httpx


class Raw:
    """Requests to one server, as bytes."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname or "", parts.port or 80)
        self.key = key

    def head(self, method: str, path: str, *fields: str) -> bytes:
        """A request's head, without its empty last line."""
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {self.key}",
        ]
        return "".join(f"{line}\r\n" for line in (*lines, *fields)).encode()

    def request(self, path: str, body: dict[str, object] | bytes) -> bytes:
        """A whole POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = ("Content-Type: application/json", f"Content-Length: {len(data)}")
        return self.head("POST", path, *fields) + b"\r\n" + data

    def connect(self, data: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        """A connection that has sent `data`."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(20)
        sock.connect(self.address)
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        return sock

    def ask(self, chunks: Iterable[bytes]) -> int:
        """The status of the answer, sending until it is there; 0 for a connection that ended
        without one."""
        with self.connect() as sock:
            for chunk in chunks:
                try:
                    sock.sendall(chunk)
                except ConnectionError:
                    break
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    if sock.recv(1, socket.MSG_PEEK):
                        break
                sock.settimeout(20)
            sock.settimeout(20)
            with contextlib.suppress(ConnectionError):
                line = sock.recv(64).split()
                return int(line[1]) if len(line) > 1 else 0
        return 0


def vanish(sock: socket.socket) -> None:
    """Ends a connection by a reset, as a client that is killed behind a firewall does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def post_text(http: httpx.Client, path: str, text: str | bytes) -> httpx.Response:
    """JSON that is written by hand."""
    return http.post(path, content=text, headers={"content-type": "application/json"})
