# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The sockets and bytes between supervisor, API servers and engine.

All sockets are ipc in one folder with mode 0700. The engine binds `engine.sock`; client i binds
`client-i.sock`, which the engine connects to. A child gets its start message over an inherited
socket, and reads its end of file as its parent's death.
"""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq

from llmserve.core.messages import FromEngine, ToEngine

T = TypeVar("T")
_MAX_MESSAGE_BYTES = 1 << 30


def engine_address(run_dir: str) -> str:
    """Where the engine listens."""
    return f"ipc://{Path(run_dir, 'engine.sock')}"


def client_address(run_dir: str, index: int) -> str:
    """Where client `index` listens."""
    return f"ipc://{Path(run_dir, f'client-{index}.sock')}"


def pull_socket(context: zmq.Context[Any], address: str) -> zmq.Socket[bytes]:
    """A bound receiving socket."""
    pull: zmq.Socket[bytes] = context.socket(zmq.PULL)
    pull.setsockopt(zmq.RCVHWM, 0)
    pull.setsockopt(zmq.LINGER, 0)
    pull.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    pull.bind(address)
    return pull


def push_socket(context: zmq.Context[Any], address: str, linger_ms: int = 0) -> zmq.Socket[bytes]:
    """A connected sending socket; the other side may come later."""
    push: zmq.Socket[bytes] = context.socket(zmq.PUSH)
    push.setsockopt(zmq.SNDHWM, 0)
    push.setsockopt(zmq.LINGER, linger_ms)
    push.setsockopt(zmq.RECONNECT_IVL, 20)
    push.connect(address)
    return push


class Codec:
    """Encoders and decoders of both directions, made once a process."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    def encode(self, message: ToEngine | FromEngine) -> bytes:
        """Either direction."""
        return self._encoder.encode(message)

    def decode_to_engine(self, data: bytes) -> ToEngine:
        """msgspec.ValidationError or DecodeError for bytes that are no message."""
        return self._to_engine.decode(data)

    def decode_from_engine(self, data: bytes) -> FromEngine:
        """msgspec.ValidationError or DecodeError for bytes that are no message."""
        return self._from_engine.decode(data)


def drain(pull: zmq.Socket[bytes]) -> list[bytes]:
    """All messages that are there, without waiting."""
    messages = []
    while True:
        try:
            messages.append(pull.recv(zmq.NOBLOCK))
        except zmq.Again:
            return messages


def announce(run_dir: str, index: int, message: FromEngine) -> None:
    """One message to client `index`, from a process that is about to end or speaks for one."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    push = push_socket(context, client_address(run_dir, index), linger_ms=200)
    push.send(Codec().encode(message))
    push.close()
    context.term()


def send_start(channel: socket.socket, message: object) -> None:
    """Parent's side: the start message, length first. The channel stays open while we live."""
    data = msgspec.msgpack.encode(message)
    channel.sendall(len(data).to_bytes(8, "little") + data)


def receive_start(fd: int, kind: type[T]) -> T:
    """Child's side: reads the start message, then dies when the parent does.

    SIGINT is left to the parent, which tells its children what to do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=fd)
    stream = channel.makefile("rb")
    length = int.from_bytes(stream.read(8), "little")
    message = msgspec.msgpack.decode(stream.read(length), type=kind)

    def watch() -> None:
        stream.read(1)
        channel.close()
        os.killpg(0, signal.SIGKILL)  # whatever this process started goes too

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return message
