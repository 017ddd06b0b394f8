# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Processes of our own: started with a message, watched, and never left behind.

The start message crosses an inherited socket, length first. The child reads the socket's end of
file as its parent's death, however that came.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TypeVar

import msgspec

from llmserve import envs

T = TypeVar("T")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


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


def make_run_dir() -> str:
    """A private folder for sockets; its path is short, as socket paths must be."""
    return tempfile.mkdtemp(prefix="llmserve-", dir=envs.RUNTIME_DIR)
