# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The servers as the supervisor counts them; real ones are in tests/faults/test_api_servers.py."""

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmserve.cli import api_servers as module
from llmserve.cli.api_servers import ApiServers, default_count
from llmserve.config.model import ModelConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import Clients
from llmserve.engine.launch import ApiStart
from llmserve.metrics import board as board_module
from llmserve.metrics.board import READY, Board
from llmserve.utils import heartbeat
from tests.helpers.clock import Clock
from tests.helpers.frontend import model_info


@pytest.mark.parametrize(
    ("on_gpu", "cores", "seqs", "billions", "count"),
    [
        (False, 64, 64, 0.6, 1),
        (True, 2, 1024, 0.6, 1),
        (True, 16, 256, 0.6, 2),
        (True, 64, 1024, 0.6, 4),
        (True, 16, 256, 8, 1),
        (True, 16, 1024, 8, 3),
        (True, 64, 1024, 70, 1),
    ],
)
def test_default_count(on_gpu: bool, cores: int, seqs: int, billions: float, count: int) -> None:
    info = model_info(on_gpu=on_gpu, max_num_seqs=seqs, weight_bytes=int(billions * 2e9))
    assert default_count(info, cores) == count


class FakeChild:
    """A process that lives until its `code` is set."""

    def __init__(self, name: str, start: ApiStart, fds: tuple[int, ...]) -> None:
        self.start = start
        self.code: int | None = None
        self.ended: list[float] = []
        self.process = SimpleNamespace(pid=0, poll=lambda: self.code)

    def alive(self) -> bool:
        return self.code is None

    def end(self, timeout: float) -> None:
        self.ended.append(timeout)


class Servers:
    def __init__(self, folder: Path, sock: socket.socket) -> None:
        self.engine: Any = SimpleNamespace(run_dir=str(folder), number=3, clients=[0, 1, 2])
        self.sent: list[Clients] = []
        client: Any = SimpleNamespace(send=self.sent.append)
        server = ServerConfig(api_hang_timeout=5)
        self.all = ApiServers(server, ModelConfig(model="m"), sock, self.engine, client)
        self.all.set_count(2)

    def child(self, slot: int) -> Any:
        return self.all._processes[slot].child

    def board(self, slot: int) -> Board:
        start = self.child(slot).start
        return Board(start.board, start.slot)


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    monkeypatch.setattr(module, "Child", FakeChild)
    monkeypatch.setattr(module, "dump_stacks", lambda pid, number: [])
    with socket.socket() as sock:
        yield Servers(tmp_path, sock)


def test_a_dead_one_is_replaced_by_another_client(servers: Servers) -> None:
    assert not servers.sent  # the engine was started with these
    assert [servers.child(slot).start.client for slot in (0, 1)] == [1, 2]
    servers.board(1).move(0, 4)
    servers.board(0).move(0, 2)
    dead = servers.child(1)
    dead.code = -9
    assert servers.all.lost() == (1, "the API server process ended (exit code -9)")
    assert servers.all.alive(but=1) and not servers.all.alive(but=0)
    servers.all.drop(1)
    assert dead.ended == [0.0]
    assert servers.engine.clients == [0, 1] and servers.all.lost() is None
    assert servers.board(0).places(0) == 2
    servers.all.restart(1)
    assert (servers.child(1).start.client, servers.child(1).start.slot) == (3, 1)
    assert servers.child(1).start.engine == 3
    assert servers.engine.clients == [0, 1, 3]
    assert servers.sent == [Clients(0, [0, 1]), Clients(0, [0, 1, 3])]
    assert servers.all.lost() is None


def test_a_stuck_one_is_lost_if_we_were_not_stopped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for user in (board_module, heartbeat):
        monkeypatch.setattr(user, "time", clock)
    monkeypatch.setattr(module, "Child", FakeChild)
    with socket.socket() as sock:
        servers = Servers(tmp_path, sock)
        servers.board(0).beat()
        assert servers.all.lost() is None
        for _ in range(3):
            clock.now += 600.0  # all were stopped, or the machine
            assert servers.all.lost() is None
        servers.board(0).beat()
        assert servers.all.lost() is None
        for _ in range(10):  # 5 s: one is nearly late, the other may take longer to come up
            clock.now += 0.5
            assert servers.all.lost() is None
        clock.now += 0.5
        assert servers.all.lost() == (0, "the API server has been stuck for 5.5 s")
        for _ in range(120):
            clock.now += 0.5
            servers.board(0).beat()
            if (lost := servers.all.lost()) is not None:
                break
        assert lost is not None and lost[0] == 1


def test_ready_is_all_of_them(servers: Servers) -> None:
    servers.board(0).set(READY, 1)
    assert not servers.all.ready()
    servers.board(1).set(READY, 1)
    assert servers.all.ready()
    servers.all.set_count(3)
    assert not servers.all.ready() and servers.sent == [Clients(0, [0, 1, 2, 3])]
