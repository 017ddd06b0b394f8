# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Starting, watching and ending the engine process."""

import contextlib
import os
import shutil

import msgspec

from llmserve.config.engine import EngineConfig
from llmserve.config.model import ModelConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, FromEngine, ModelInfo
from llmserve.engine.channel import announce, engine_address, heartbeat_path
from llmserve.engine.client import EngineClient, model_in
from llmserve.errors import EngineError
from llmserve.utils.address_space import check_address_space
from llmserve.utils.child import Child, make_run_dir
from llmserve.utils.heartbeat import Heartbeat

SUPERVISOR = 0  # the client that owns the engine: alone, or beside API servers


class EngineStart(msgspec.Struct):
    """The engine process's start message. `engine` is how many were there before it."""

    config: EngineConfig
    run_dir: str
    clients: list[int]
    engine: int


class ApiStart(msgspec.Struct):
    """An API server process's start message. `socket_fd` listens already and is inherited; `engine`
    is the number of the engine to speak to; `slot` is the process's row on the `board`, a path."""

    server: ServerConfig
    model: ModelConfig
    run_dir: str
    client: int
    socket_fd: int
    board: str
    slot: int = 0
    engine: int = 0


class EngineProcess:
    """The engine and the folder that its sockets are in. `number` counts the engines before it."""

    def __init__(self, config: EngineConfig, num_clients: int, run_dir: str) -> None:
        self.run_dir = run_dir
        self.clients = list(range(num_clients))  # whom it sends to
        self.number = 0
        self._config = config
        self._start()

    def _start(self) -> None:
        self.heartbeat = Heartbeat(heartbeat_path(self.run_dir, self.number))
        start = EngineStart(self._config, self.run_dir, self.clients, self.number)
        self.child = Child("llmserve.engine.process", start)

    def restart(self) -> None:
        """Kills what is left of the engine, and starts the next one."""
        self.child.end(0.0)
        address = engine_address(self.run_dir, self.number).removeprefix("ipc://")
        for path in (address, heartbeat_path(self.run_dir, self.number)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self.number += 1
        self._start()

    def connect(self, index: int) -> EngineClient:
        """Client `index` of `clients`, for this process."""
        return EngineClient(self.run_dir, index, self.number)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.child.alive()

    def wait_ready(self, client: EngineClient) -> ModelInfo:
        """Waits for the engine; ConfigError or EngineError with its reason if it gives up."""
        while True:
            client.wait(0.1)
            alive = self.alive()  # asked first: what it said before it died is then there
            model = model_in(client.receive())
            if model is not None:
                return model
            if not alive:
                code = self.child.process.returncode
                raise EngineError(f"the engine process ended while starting (exit code {code})")

    def announce(self, message: FromEngine) -> None:
        """Tells every client what a dead engine cannot."""
        for index in self.clients:
            announce(self.run_dir, index, message)

    def announce_death(self) -> None:
        """Tells every client that no more will come."""
        self.announce(EngineFailed("the engine process ended", False))

    def shutdown(self, timeout: float = 5.0) -> None:
        """Ends the engine and removes its folder; idempotent."""
        try:
            self.child.terminate()
            self.child.end(timeout)
        finally:  # interrupted too, by one who cannot wait
            shutil.rmtree(self.run_dir, ignore_errors=True)


def launch_engine(config: EngineConfig, num_clients: int = 1) -> EngineProcess:
    """Starts an engine of its own; `connect` and `wait_ready` follow. ConfigError where it has no
    room."""
    check_address_space()
    run_dir = make_run_dir()
    try:
        return EngineProcess(config, num_clients, run_dir)
    except OSError:
        shutil.rmtree(run_dir, ignore_errors=True)
        raise
