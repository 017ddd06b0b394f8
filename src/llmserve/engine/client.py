# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The frontend's end of the engine's sockets."""

from collections.abc import Iterable

import msgspec
import zmq

from llmserve.core.messages import EngineFailed, EngineReady, FromEngine, ModelInfo, ToEngine
from llmserve.engine.channel import (
    MAX_FROM_ENGINE_BYTES,
    Codec,
    client_address,
    drain,
    engine_address,
    heartbeat_path,
    pull_socket,
    push_socket,
)
from llmserve.errors import ConfigError, EngineError
from llmserve.utils.heartbeat import Heartbeat
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)


def model_in(messages: Iterable[FromEngine]) -> ModelInfo | None:
    """The model of an engine that says it is ready; None while it says nothing of the kind.

    ConfigError or EngineError, with its reason, where it gives up.
    """
    for message in messages:
        if isinstance(message, EngineReady):
            return message.model
        if isinstance(message, EngineFailed):
            raise (ConfigError if message.user_error else EngineError)(message.message)
    return None


class EngineClient:
    """One client. `index` is what its requests carry as `client`, `engine` the number of the engine
    that it speaks to."""

    def __init__(self, run_dir: str, index: int, engine: int = 0) -> None:
        self.index = index
        self.engine = engine
        self.num_dropped_frames = 0  # messages that were none
        self.heartbeat = Heartbeat(heartbeat_path(run_dir, engine))
        self._run_dir = run_dir
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._codec = Codec()
        self._pull = pull_socket(
            self._context, client_address(run_dir, index), MAX_FROM_ENGINE_BYTES
        )
        self._push = push_socket(self._context, engine_address(run_dir, engine))

    def reconnect(self, engine: int) -> None:
        """Speaks to another engine from now on, which may still have to start."""
        self.engine = engine
        self.heartbeat = Heartbeat(heartbeat_path(self._run_dir, engine))
        self._push.close(linger=0)
        self._push = push_socket(self._context, engine_address(self._run_dir, engine))

    def fileno(self) -> int:
        """Becomes readable when messages arrive; edge-triggered, so `receive` drains."""
        return int(self._pull.getsockopt(zmq.FD))

    def send(self, message: ToEngine) -> None:
        """Hands the message to the socket; never waits."""
        self._push.send(self._codec.encode(message), zmq.NOBLOCK)

    def receive(self) -> list[FromEngine]:
        """All messages that are there; what is none is counted and dropped."""
        messages = []
        for data in drain(self._pull):
            try:
                messages.append(self._codec.decode_from_engine(data))
            except msgspec.DecodeError as error:
                self.num_dropped_frames += 1
                if self.num_dropped_frames.bit_count() == 1:  # 1, 2, 4, 8 ...
                    count, reason = self.num_dropped_frames, str(error)[:200]
                    logger.error("dropped %d messages; the last: %s", count, reason)
        return messages

    def wait(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for a message."""
        return bool(self._pull.poll(int(timeout * 1000)))

    def close(self) -> None:
        """Drops whatever was not sent."""
        self._context.destroy(linger=0)
