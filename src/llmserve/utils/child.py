# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Processes of our own: started with a message, watched, and never left behind.

The start message crosses an inherited socket, length first. A child dies with its parent, however
that came: the kernel kills it (Linux), and it reads the socket's end of file as the parent's death.
"""

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import msgspec

from llmserve import envs
from llmserve.errors import ConfigError

T = TypeVar("T")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
WHEN_STUCK = signal.SIGRTMIN
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_DUMP_S = 0.3  # for the stacks of a process to be written
_RUN_DIR = "llmserve-"
_LONGEST = 107 - len("/client-65535.sock")  # bytes: what a Unix socket's path may have, but NUL
_UNLOCKED_S = 10.0  # an empty folder this young may be about to get its owner's lock
_locks: list[int] = []  # of this process's folders, held until it ends


class Child:
    """A process of ours: started with a message, alive as long as we are, ended as a group."""

    def __init__(self, module: str, start: object, pass_fds: tuple[int, ...] = ()) -> None:
        self._channel, theirs = socket.socketpair()
        path = os.pathsep.join(
            [_PACKAGE_ROOT, *envs.child_environment().get("PYTHONPATH", "").split(os.pathsep)]
        )
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *pass_fds),
                stdin=subprocess.DEVNULL,
                env=envs.child_environment(PYTHONPATH=path.rstrip(os.pathsep)),
                start_new_session=True,  # Ctrl-C reaches us alone
            )
        with contextlib.suppress(BrokenPipeError):  # it is gone already; `alive` tells
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
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        finally:  # interrupted too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._channel.close()


def send_start(channel: socket.socket, message: object) -> None:
    """Parent's side: the start message, length first. The channel stays open while we live."""
    # The kernel's signal comes when the starting thread ends, so only the main thread may ask.
    bound = threading.current_thread() is threading.main_thread()
    data = msgspec.msgpack.encode(message)
    channel.sendall(len(data).to_bytes(8, "little") + bytes([bound]) + data)


def receive_start(fd: int, kind: type[T], sweep: Callable[[T], None] | None = None) -> T:
    """Child's side: reads the start message, then dies when the parent does.

    One that is given `sweep` calls it first, to remove what the parent could not. SIGINT is left to
    the parent, which tells its children what to do; SIGUSR1 writes all stacks to the log, and so
    does `WHEN_STUCK`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    signal.signal(signal.SIGUSR1, write_stacks)
    faulthandler.register(WHEN_STUCK)
    channel = socket.socket(fileno=fd)
    stream = channel.makefile("rb")
    length = int.from_bytes(stream.read(8), "little")
    bound = stream.read(1) == b"\1"
    data = stream.read(length)
    if not data or len(data) < length:  # the parent was ended before it had sent all of it
        raise SystemExit(1)
    if bound and sweep is None:
        # Works where the watching thread does not: while we are stopped, or a call keeps the lock.
        die_with_parent()
    message = msgspec.msgpack.decode(data, type=kind)

    def watch() -> None:
        stream.read(1)
        channel.close()
        if sweep is not None:
            sweep(message)
        os.killpg(0, signal.SIGKILL)  # whatever this process started goes too

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    return message


def die_with_parent() -> None:
    """Has the kernel kill us when the thread that started us ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def write_stacks(signum: int, frame: FrameType | None) -> None:
    """Handles SIGUSR1. The main thread has the interpreter's lock meanwhile: from a handler in C,
    which needs no lock, others go on while their frames are read, and the process may crash."""
    faulthandler.dump_traceback()


def dump_stacks(root: int, number: int = signal.SIGUSR1) -> list[int]:
    """Has `root` and its descendants, but not us, write their stacks to the log; their pids.
    `number` may be `WHEN_STUCK` for those that will be ended: it waits for no lock.

    Only who handles it is sent it: to others, as to one that is just starting, it is death.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    told = [pid for pid in found if pid != os.getpid() and _handles(pid, number)]
    for pid in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        time.sleep(_DUMP_S)  # a stack is written word by word, to what all of them write to
    return told


def _handles(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def make_run_dir() -> str:
    """A private folder for sockets; its path is short, as socket paths must be.

    It is locked as long as we live. Folders whose owner was killed are removed. ConfigError where
    none can be made.
    """
    sweep_run_dirs()
    path = ""
    try:
        path = tempfile.mkdtemp(prefix=_RUN_DIR, dir=envs.RUNTIME_DIR)
        if len(os.fsencode(path)) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, "too long a path (of XDG_RUNTIME_DIR or TMPDIR)")
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path:
            os.rmdir(path)
        raise ConfigError(
            f"cannot make a folder for sockets in {envs.RUNTIME_DIR}: {error.strerror}"
        ) from None
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _locks.append(lock)
    return path


def sweep_run_dirs() -> None:
    """Removes our folders whose owner is gone: the lock of a process ends with it."""
    for path in envs.RUNTIME_DIR.glob(f"{_RUN_DIR}*"):
        with contextlib.suppress(OSError):  # another's folder, or another sweeps too
            state = path.stat()
            young = time.time() - state.st_mtime < _UNLOCKED_S and not any(path.iterdir())
            if state.st_uid != os.getuid() or young:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def clear_socket(path: str) -> None:
    """Removes the socket that a killed server left; never a file, nor one that is listened on."""
    if Path(path).is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
