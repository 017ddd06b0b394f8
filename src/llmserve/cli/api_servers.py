# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The API server processes, as their supervisor starts, watches and ends them."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from llmserve.config.model import ModelConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import Clients, ModelInfo
from llmserve.engine.channel import client_address
from llmserve.engine.client import EngineClient
from llmserve.engine.launch import SUPERVISOR, ApiStart, EngineProcess
from llmserve.metrics.board import Board
from llmserve.utils.child import WHEN_STUCK, Child, dump_stacks
from llmserve.utils.heartbeat import Watchdog
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_START_S = 60.0  # from a process's start to the first sign of its event loop
_TOKENS_S = 50_000  # tokens/s that one server streams one by one (benchmarks/LOG.md)
_STEP_S = 2.5e-3  # the shortest step there is
_BYTES_S = 2e12  # of weights, read by a step
_MOST = 4
_CORES = 4  # for one server


def default_count(info: ModelInfo, num_cores: int) -> int:
    """API servers for as many tokens/s as the model can give at most: one a running request and
    step, which takes as long as reading the weights."""
    if not info.on_gpu:
        return 1
    tokens_s = info.max_num_seqs / max(_STEP_S, info.weight_bytes / _BYTES_S)
    return max(1, min(_MOST, num_cores // _CORES, round(tokens_s / _TOKENS_S)))


@dataclass
class _Process:
    child: Child
    client: int
    watchdog: Watchdog


class ApiServers:
    """All that listen on one socket, each with a slot on the board and a client index of its own:
    the index of one that ended never comes back, so nothing meant for it reaches another."""

    def __init__(
        self,
        server: ServerConfig,
        model: ModelConfig,
        sock: socket.socket,
        engine: EngineProcess,
        client: EngineClient,
    ) -> None:
        self._server = server
        self._model = model
        self._sock = sock
        self._engine = engine
        self._client = client
        self._path = str(Path(engine.run_dir, "api-servers"))
        self._board = Board(self._path, num_keys=len(server.api_key))
        self._next_client = SUPERVISOR + 1
        self._processes: dict[int, _Process] = {}  # by slot

    def set_count(self, count: int) -> None:
        """Starts servers until there are `count`."""
        for slot in range(len(self._processes), count):
            self._processes[slot] = self._start(slot)
        self._tell_engine()

    def _start(self, slot: int) -> _Process:
        fd, client = self._sock.fileno(), self._next_client
        self._next_client += 1
        start = ApiStart(
            self._server, self._model, self._engine.run_dir, client, fd, self._path, slot,
            self._engine.number,
        )  # fmt: skip
        return _Process(Child("llmserve.api.server", start, (fd,)), client, Watchdog())

    def _tell_engine(self) -> None:
        clients = [SUPERVISOR, *(process.client for process in self._processes.values())]
        if clients != self._engine.clients:
            self._engine.clients[:] = clients
            self._client.send(Clients(SUPERVISOR, clients))

    def lost(self) -> tuple[int, str] | None:
        """The slot of one that has ended or hangs, and what happened to it."""
        for slot, process in self._processes.items():
            if not process.child.alive():
                code = process.child.process.poll()
                return slot, f"the API server process ended (exit code {code})"
        for slot, process in self._processes.items():
            sign = self._board.sign(slot)
            quiet = process.watchdog.quiet(sign)
            if quiet > (self._server.api_hang_timeout if sign else _START_S):
                return slot, f"the API server has been stuck for {quiet:.1f} s"
        return None

    def drop(self, slot: int) -> None:
        """Ends what is left of a server and gives back what it had."""
        process = self._processes.pop(slot)
        if process.child.alive():
            dump_stacks(process.child.process.pid, WHEN_STUCK)
        process.child.end(0.0)
        self._board.replace(slot)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(client_address(self._engine.run_dir, process.client).removeprefix("ipc://"))
        self._tell_engine()

    def restart(self, slot: int) -> None:
        """Starts a server in the place of one that was dropped."""
        self._processes[slot] = self._start(slot)
        self._tell_engine()

    def alive(self, but: int | None = None) -> bool:
        """Whether any runs, besides that of slot `but`."""
        return any(
            process.child.alive() for slot, process in self._processes.items() if slot != but
        )

    def ready(self) -> bool:
        """Whether all take requests."""
        return all(self._board.is_ready(slot) for slot in self._processes)

    def terminate(self) -> None:
        """Asks all to drain, or to end now if they drain already."""
        for process in self._processes.values():
            process.child.terminate()

    def end(self, timeout: float) -> None:
        """Gives all `timeout` seconds to end, then kills them."""
        deadline = time.monotonic() + timeout
        for process in self._processes.values():
            process.child.end(max(0.0, deadline - time.monotonic()))
