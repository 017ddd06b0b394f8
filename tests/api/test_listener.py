# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Listeners that share a socket, as processes do."""

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmserve.api import listener as module
from llmserve.api.listener import Listener


class Accepting:
    """A listener on its own descriptor of the socket."""

    def __init__(self, sock: socket.socket, accepts: Callable[[int, bool], bool]) -> None:
        self.connections: list[asyncio.BaseTransport] = []
        self.sock = sock.dup()
        outer = self

        class Counted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                outer.connections.append(transport)

        self.listener = Listener(self.sock, Counted, accepts)

    def close(self) -> None:
        self.listener.close()
        self.sock.close()
        for transport in self.connections:
            transport.close()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
        yield sock


async def until(done: Callable[[], bool]) -> None:
    for _ in range(400):
        if done():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came")


async def test_a_burst_is_shared_by_who_has_fewer(sock: socket.socket) -> None:
    both: list[Accepting] = []

    def turn(index: int) -> Callable[[int, bool], bool]:
        def accepts(opening: int, left: bool) -> bool:
            return left or len(both[index].connections) + opening <= len(
                both[1 - index].connections
            )

        return accepts

    both += [Accepting(sock, turn(0)), Accepting(sock, turn(1))]
    clients = [socket.create_connection(sock.getsockname()) for _ in range(32)]
    await until(lambda: sum(len(one.connections) for one in both) == 32)
    assert all(12 <= len(one.connections) <= 20 for one in both)
    for one in both:
        one.close()
    for client in clients:
        client.close()


async def test_one_left_to_others_is_taken_when_nobody_does(sock: socket.socket) -> None:
    asked: list[tuple[int, bool]] = []

    def accepts(opening: int, left: bool) -> bool:
        asked.append((opening, left))
        return len(asked) == 4

    one = Accepting(sock, accepts)
    with socket.create_connection(sock.getsockname()):
        await until(lambda: len(one.connections) == 1)
    # And once more after it, without leaving: whether another is there is not known
    assert asked == [(0, False), (0, True), (0, True), (0, True), (1, False)]
    one.close()


async def test_a_wake_takes_a_few(sock: socket.socket) -> None:
    turns: list[int] = []
    asked = 0

    def accepts(opening: int, left: bool) -> bool:
        nonlocal asked
        asked += 1
        return True

    clients = [socket.create_connection(sock.getsockname()) for _ in range(32)]
    one = Accepting(sock, accepts)
    while len(one.connections) < 32:
        before = asked
        await asyncio.sleep(0)
        turns.append(asked - before)
    assert 4 <= max(turns) <= 8, "more make a turn long; with fewer the last waits for many turns"
    one.close()
    for client in clients:
        client.close()


async def test_out_of_descriptors_it_waits(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXHAUSTED_S", 0.05)
    failures = 2

    class Exhausted:
        def __getattr__(self, name: str) -> Any:
            return getattr(one.sock, name)

        def accept(self) -> Any:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise OSError(errno.EMFILE, "too many")
            return one.sock.accept()

    one = Accepting(sock, lambda opening, left: True)
    one.listener._sock = Exhausted()  # type: ignore[assignment]
    with socket.create_connection(sock.getsockname()):
        began = asyncio.get_running_loop().time()
        await until(lambda: len(one.connections) == 1)
        assert asyncio.get_running_loop().time() - began >= 0.1
    one.close()


async def test_closed_while_it_waits_it_takes_nothing_more(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAVE_S", 0.02)
    one = Accepting(sock, lambda opening, left: False)
    with socket.create_connection(sock.getsockname()):
        await until(lambda: one.listener._timer is not None)
        one.close()
        await asyncio.sleep(0.05)
    assert not one.connections
