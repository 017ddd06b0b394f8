# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Connections from a socket that several API servers listen on.

Left to the kernel, one server takes most of them: whoever wakes first empties the queue (64 at
once: 0 and 64, or 16 and 48, on two servers). SO_REUSEPORT deals them out by a hash (26 and 38),
but those that it gives to a server that is stuck or restarting wait for it. Here each wake takes
a few connections, and a server that has more than another leaves the next to that one for a moment.
"""

import asyncio
import socket
from collections.abc import Callable

_AT_ONCE = 4  # one a turn, and a probe behind 20 bodies waits as many turns; all make one turn long
_LEAVE_S = 0.005  # to a server that has fewer connections, or is ready
_EXHAUSTED_S = 0.5  # out of descriptors


class Listener:
    """Accepts for the running loop until it is closed. `accepts` says whether it is our turn, given
    how many connections are being opened and whether we have just left this one to others."""

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        accepts: Callable[[int, bool], bool],
    ) -> None:
        self._sock = sock
        self._make = make
        self._accepts = accepts
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._left = False
        sock.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._timer = self._loop.call_later(seconds, self._listen)

    def _on_readable(self) -> None:
        self._left = not self._accepts(len(self._opening), self._left)
        if self._left:
            self._pause(_LEAVE_S)
            return
        for _ in range(_AT_ONCE):
            # Another may not be there yet, so it is left to nobody here
            if not self._accept() or not self._accepts(len(self._opening), False):
                return

    def _accept(self) -> bool:
        try:
            connection = self._sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):  # another server has it; its client left
            return False
        except OSError:
            self._pause(_EXHAUSTED_S)
            return False
        connection.setblocking(False)
        task = self._loop.create_task(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    async def _open(self, connection: socket.socket) -> None:
        await self._loop.connect_accepted_socket(self._make, connection)

    def close(self) -> None:
        """Takes no more connections; the socket stays open."""
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.remove_reader(self._sock.fileno())
