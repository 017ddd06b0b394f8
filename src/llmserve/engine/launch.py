# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Starting, watching and ending the engine process."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from llmserve import envs
from llmserve.config.engine import EngineConfig
from llmserve.config.model import ModelConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, EngineReady, ModelInfo
from llmserve.engine.channel import announce, send_start
from llmserve.engine.client import EngineClient
from llmserve.errors import ConfigError, EngineError

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class EngineStart(msgspec.Struct):
    """The engine process's start message."""

    config: EngineConfig
    run_dir: str
    num_clients: int


class ApiStart(msgspec.Struct):
    """An API server process's start message. `socket_fd` listens already and is inherited;
    `supervisor` is the client that is told why the process ended."""

    server: ServerConfig
    model: ModelConfig
    run_dir: str
    client: int
    supervisor: int
    socket_fd: int


class Child:
    """A process of ours: started with a message, alive as long as we are, ended as a group."""

    def __init__(self, module: str, start: object, pass_fds: tuple[int, ...] = ()) -> None:
        self._channel, theirs = socket.socketpair()
        path = os.pathsep.join(
            [_PACKAGE_ROOT, *envs.child_environment().get("PYTHONPATH", "").split(os.pathsep)]
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=(theirs.fileno(), *pass_fds),
            stdin=subprocess.DEVNULL,
            env=envs.child_environment(PYTHONPATH=path.rstrip(os.pathsep)),
            start_new_session=True,  # Ctrl-C reaches us alone
        )
        theirs.close()
        send_start(self._channel, start)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def terminate(self) -> None:
        """SIGTERM to the process."""
        if self.alive():
            self.process.terminate()

    def end(self, timeout: float) -> None:
        """Waits `timeout` seconds for the process, then kills it and all it started."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._channel.close()


def make_run_dir() -> str:
    """A private folder for sockets; its path is short, as socket paths must be."""
    return tempfile.mkdtemp(prefix="llmserve-", dir=envs.RUNTIME_DIR)


class EngineProcess:
    """The engine and the folder that its sockets are in."""

    def __init__(self, config: EngineConfig, num_clients: int, run_dir: str) -> None:
        self.run_dir = run_dir
        self.num_clients = num_clients
        self.child = Child("llmserve.engine.process", EngineStart(config, run_dir, num_clients))

    def connect(self, index: int) -> EngineClient:
        """Client `index` of `num_clients`, for this process."""
        return EngineClient(self.run_dir, index)

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.child.alive()

    def wait_ready(self, client: EngineClient) -> ModelInfo:
        """Waits for the engine; ConfigError or EngineError with its reason if it gives up."""
        while True:
            client.wait(0.1)
            alive = self.alive()  # asked first: what it said before it died is then there
            for message in client.receive():
                if isinstance(message, EngineReady):
                    return message.model
                if isinstance(message, EngineFailed):
                    raise (ConfigError if message.user_error else EngineError)(message.message)
            if not alive:
                code = self.child.process.returncode
                raise EngineError(f"the engine process ended while starting (exit code {code})")

    def announce_death(self) -> None:
        """Tells every client what the dead engine could not."""
        for index in range(self.num_clients):
            announce(self.run_dir, index, EngineFailed("the engine process ended", False))

    def shutdown(self, timeout: float = 5.0) -> None:
        """Ends the engine and removes its folder; idempotent."""
        self.child.terminate()
        self.child.end(timeout)
        shutil.rmtree(self.run_dir, ignore_errors=True)


def launch_engine(config: EngineConfig, num_clients: int = 1) -> EngineProcess:
    """Starts an engine of its own; `connect` and `wait_ready` follow."""
    return EngineProcess(config, num_clients, make_run_dir())
