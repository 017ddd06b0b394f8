# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The sockets and bytes between supervisor, API servers and engine.

All sockets are ipc in one folder with mode 0700. Engine number n, the first being 0, binds
`engine-n.sock`; client i binds `client-i.sock`, which every engine connects to. So nothing that was
meant for a dead engine reaches the next one.
"""

from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq

from llmserve.core.messages import EngineOutputs, FromEngine, RequestExtra, ToEngine
from llmserve.errors import RequestError

T = TypeVar("T")

MAX_TO_ENGINE_BYTES = 128 << 20  # a prompt of 4 bytes a token, and its parameters
MAX_FROM_ENGINE_BYTES = 512 << 20  # what comes in `parts` is far below
_PART_BYTES = 64 << 20  # of log-probabilities; those of one request may be as many by themselves


def engine_address(run_dir: str, engine: int = 0) -> str:
    """Where engine number `engine` listens."""
    return f"ipc://{Path(run_dir, f'engine-{engine}.sock')}"


def heartbeat_path(run_dir: str, engine: int = 0) -> str:
    """The page in which engine number `engine` shows that it gets on."""
    return str(Path(run_dir, f"heartbeat-{engine}"))


def client_address(run_dir: str, index: int) -> str:
    """Where client `index` listens."""
    return f"ipc://{Path(run_dir, f'client-{index}.sock')}"


def pull_socket(context: zmq.Context[Any], address: str, max_bytes: int) -> zmq.Socket[bytes]:
    """A bound receiving socket; the sender of a longer message is cut off."""
    pull: zmq.Socket[bytes] = context.socket(zmq.PULL)
    pull.setsockopt(zmq.RCVHWM, 0)
    pull.setsockopt(zmq.LINGER, 0)
    pull.setsockopt(zmq.MAXMSGSIZE, max_bytes)
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
        """msgspec.DecodeError for bytes that are no message."""
        return _decode(self._to_engine, data)

    def decode_from_engine(self, data: bytes) -> FromEngine:
        """msgspec.DecodeError for bytes that are no message."""
        return _decode(self._from_engine, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, OverflowError, RecursionError, RequestError) as error:
        raise msgspec.DecodeError(str(error)) from None  # of text, numbers, depth and parameters


def parts(news: EngineOutputs) -> list[EngineOutputs]:
    """`news`, cut between requests where their log-probabilities are many."""
    groups: list[dict[int, RequestExtra]] = [{}]
    size = 0
    for wire_id, extra in news.extras.items():
        more = sum(8 * it.n * it.width for it in (extra.logprobs, extra.prompt_logprobs) if it)
        size += more
        if more and size > _PART_BYTES and groups[-1]:
            groups.append({})
            size = more
        groups[-1][wire_id] = extra
    if len(groups) == 1:
        return [news]
    ids, tokens = np.frombuffer(news.ids, np.uint32), np.frombuffer(news.tokens, np.int32)
    group_of = {wire_id: i for i, group in enumerate(groups) for wire_id in group}
    owners = np.array([group_of.get(wire_id, 0) for wire_id in ids.tolist()], np.int64)
    return [
        EngineOutputs(
            ids=ids[owners == i].tobytes(), tokens=tokens[owners == i].tobytes(), extras=group
        )
        for i, group in enumerate(groups)
    ]


def drain(pull: zmq.Socket[bytes]) -> list[bytes]:
    """All messages that are there, without waiting. One in parts is none, and comes as b""."""
    messages = []
    while True:
        try:
            data = pull.recv(zmq.NOBLOCK)
            whole = not pull.getsockopt(zmq.RCVMORE)
            while pull.getsockopt(zmq.RCVMORE):
                pull.recv(zmq.NOBLOCK)
            messages.append(data if whole else b"")
        except zmq.Again:
            return messages


def announce(run_dir: str, index: int, message: FromEngine) -> None:
    """One message to client `index`, from a process that is about to end or speaks for one."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    push = push_socket(context, client_address(run_dir, index), linger_ms=200)
    push.send(Codec().encode(message))
    push.close()
    context.term()
