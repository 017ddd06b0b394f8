# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A child that does each job in a fork of its own, so that each can be ended.

The child holds what jobs need; a fork costs a millisecond or a few. A fork's time is bound by
alarms that the kernel delivers, whatever the fork is doing, its memory by an address-space limit;
each gives way a little to what else wants a core, as the engine's step does, and once it has taken
long to all of it. A job is a socket: the child says `READY` on it, the fork reads what to do,
answers on it and ends, and an end without an answer is a fork that ran out of time or memory, or
crashed.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable

from llmserve.utils.child import Child, die_with_parent
from llmserve.utils.guard import guarded

READY = b"r"
_HEADER = struct.Struct("<ddQ")  # seconds, those on a core, bytes that follow
_START_SECONDS = 60.0  # for a child to import a library
_RETRY_S = 0.1  # how often the kernel lets a group be put back
# Niceness. With 0 at first, 20 hostile grammars had 2 cores share themselves among 7 sessions, and
# others' tokens wait for each of them; an ordinary one keeps a quarter of a busy core
_BEHIND, _LAST = 5, 19

Work = Callable[[bytes], bytes]


class Forks:
    """The parent's end, for any thread. Nothing is started before the first job.

    `start` makes the message that `module` is started with, given the descriptor of `control`.
    """

    def __init__(self, module: str, start: Callable[[int], object]) -> None:
        self._module = module
        self._start = start
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._ready_since: dict[str, float] = {}
        self.child: Child | None = None

    def open(self, name: str) -> socket.socket:
        """A job for what the child knows as `name`, not empty; the caller closes it."""
        channel, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                socket.send_fds(self._connect(), [name.encode()], [theirs.fileno()])
            except OSError:
                channel.close()
                raise
        return channel

    def ready_since(self, name: str) -> float:
        """When the first job of that name could start; now, where none could yet."""
        return self._ready_since.get(name, time.monotonic())

    def wait_ready(
        self, name: str, channel: socket.socket, seconds: float = _START_SECONDS
    ) -> float:
        """Until the job can start, for `seconds` where others could before; `ready_since`."""
        channel.settimeout(seconds if name in self._ready_since else _START_SECONDS)
        if channel.recv(1) != READY:
            raise ConnectionError(f"{self._module} ended")
        return self._ready_since.setdefault(name, time.monotonic())

    def run(
        self, channel: socket.socket, data: bytes, seconds: float, on_core: float = 0.0
    ) -> bytes | None:
        """What a fork made of `data`, in so many seconds, of them `on_core` on a core (0: all);
        None if it gave no answer."""
        parts: list[bytes] = []
        channel.settimeout(seconds + 1)
        try:
            with contextlib.suppress(ConnectionError):  # who needs no fork answers unasked
                channel.sendall(_HEADER.pack(seconds, on_core, len(data)) + data)
            with contextlib.suppress(ConnectionError):  # so it ends where nobody has read ours
                while part := channel.recv(1 << 20):
                    parts.append(part)
        except TimeoutError:
            return None
        return b"".join(parts) or None

    def close(self) -> None:
        """Ends the child and what it does; idempotent."""
        with self._lock:
            self._end()

    def _connect(self) -> socket.socket:
        if self.child is not None and not self.child.alive():
            self._end()
        if self._control is None:
            control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                start = self._start(theirs.fileno())
                self.child = Child(self._module, start, (theirs.fileno(),))
            self._control = control
        return self._control

    def _end(self) -> None:
        if self.child is not None and self._control is not None:
            self._control.close()
            self.child.end(0)
        self.child = self._control = None
        self._ready_since.clear()


class ForkServer:
    """The child's end. `work_of` gives what a fork is to do, or an answer in its place; `ordinary`
    are the seconds on a core after which a fork gives way, `memory_bytes` what it may allocate."""

    def __init__(
        self,
        control: int,
        work_of: Callable[[str], Work | bytes],
        *,
        ordinary: float,
        memory_bytes: int,
    ) -> None:
        self._control = socket.socket(fileno=control)
        self._work_of = work_of
        self._ordinary = ordinary
        self._memory_bytes = memory_bytes
        self._forks: dict[int, int] = {}  # pidfd -> pid, of those that may still give way

    def run(self) -> None:
        """One job after another until the parent closes `control`; forks run beside each other."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
        while True:
            self._wait()
            name, fds, _, _ = socket.recv_fds(self._control, 64, 1)
            if not name:
                return
            with socket.socket(fileno=fds[0]) as job:
                work = self._work_of(name.decode())
                if isinstance(work, bytes):
                    job.sendall(READY + work)
                elif (pid := os.fork()) == 0:
                    _do(work, job, self._memory_bytes)
                else:
                    with contextlib.suppress(OSError):  # it has ended: the parent gave it up
                        self._forks[os.pidfd_open(pid)] = pid

    def _wait(self) -> None:
        """For a job; meanwhile forks give way once they have run for long."""
        control = self._control.fileno()
        timeout: float | None = 0.0
        while True:
            ready, _, _ = select.select([control, *self._forks], [], [], timeout)
            for fd, pid in list(self._forks.items()):
                if fd in ready or (_used(pid) >= self._ordinary and _put_back(pid, _LAST)):
                    del self._forks[fd]
                    os.close(fd)
            if control in ready:
                return
            timeout = _RETRY_S if self._forks else None


def _do(work: Work, channel: socket.socket, memory_bytes: int) -> None:
    """In the fork; does not return."""
    os.setsid()  # the kernel may share cores out by session
    _put_back(os.getpid(), _BEHIND)
    die_with_parent()
    with contextlib.suppress(OSError):  # the parent is gone, or gave it up
        channel.sendall(READY)
        stream = channel.makefile("rb")
        header = stream.read(_HEADER.size).ljust(_HEADER.size, b"\0")
        seconds, on_core, size = _HEADER.unpack(header)
        data = stream.read(size)
        if seconds > 0:
            # Their signals end who does not ignore them
            signal.setitimer(signal.ITIMER_REAL, seconds)
            signal.setitimer(signal.ITIMER_PROF, on_core)
            with open("/proc/self/statm", "rb") as statm:
                most = int(statm.read().split()[0]) * resource.getpagesize() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            answer = guarded(lambda: work(data), _failed)
            for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
                signal.setitimer(timer, 0)  # half an answer would be taken for one
            channel.sendall(answer)
    os._exit(0)


def _failed(error: Exception) -> bytes:
    traceback.print_exception(error)
    return b""


def _used(pid: int) -> float:
    """Seconds on a core: one that had to wait for it, on a busy machine, has not taken long."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # as clock_getcpuclockid makes it
    except OSError:
        return 0.0  # it ended


def _put_back(pid: int, niceness: int) -> bool:
    """Whether there is no more to do."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, niceness)
        with open(f"/proc/{pid}/autogroup", "w") as group:
            group.write(str(niceness))
    except BlockingIOError:  # another was put back just now
        return False
    except OSError:  # it ended, or the kernel shares cores out by process
        pass
    return True
