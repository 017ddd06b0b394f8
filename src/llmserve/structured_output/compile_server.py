# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The process in which grammars are compiled: one fork a grammar, so that each can be killed.

The server holds the libraries and the vocabulary; a fork costs milliseconds. A fork's time is bound
by an alarm that the kernel delivers, whatever the library is doing, its memory by an address-space
limit; one that takes long is put behind all else that wants a core, as the engine's step does. A
job is a socket: the server says `READY` on it, the fork answers on it and ends, and an end without
an answer is a compiler that ran out of time or memory, or crashed.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time

import msgspec

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import GrammarError
from llmserve.structured_output.base import GrammarBackend
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import read_vocabulary
from llmserve.utils.child import die_with_parent, receive_start
from llmserve.utils.guard import guarded

READY = b"r"
COMPILED = b"c"
REFUSED = b"e"
_MAX_CHARS = 500
_ORDINARY_S = 0.3  # after which a fork gives way
_RETRY_S = 0.1  # how often the kernel lets an autogroup be put back
_LAST = 19  # niceness


class CompilerStart(msgspec.Struct):
    """`control` is an inherited socket on which each job's socket comes with its backend's name."""

    control: int
    tokenizer: str
    logits_width: int
    eos_token_ids: list[int]
    memory_bytes: int  # that a fork may allocate


class CompileJob(msgspec.Struct):
    """What comes first on a job's socket, length first."""

    spec: GrammarSpec
    seconds: float


class CompileServer:
    """Serves jobs until the engine's end of `control` is closed."""

    def __init__(self, start: CompilerStart) -> None:
        self._control = socket.socket(fileno=start.control)
        self._start = start
        self._backends: dict[str, GrammarBackend | str] = {}  # or why there is none
        self._forks: dict[int, tuple[int, float]] = {}  # pidfd -> pid, when it gives way

    def run(self) -> None:
        """One job after another; forks run beside each other."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for forks
        while True:
            self._wait()
            name, fds, _, _ = socket.recv_fds(self._control, 64, 1)
            if not name:
                return
            job = socket.socket(fileno=fds[0])
            backend = self._backend(name.decode())
            if isinstance(backend, str):
                job.sendall(READY + REFUSED + backend.encode())
            elif (pid := os.fork()) == 0:
                _compile(backend, job, self._start.memory_bytes)
            else:
                with contextlib.suppress(OSError):  # it has ended: the engine gave it up
                    self._forks[os.pidfd_open(pid)] = pid, time.monotonic() + _ORDINARY_S
            job.close()

    def _wait(self) -> None:
        """For a job; meanwhile forks give way once they have run for long."""
        while True:
            timeout = _RETRY_S if self._forks else None
            control = self._control.fileno()
            ready, _, _ = select.select([control, *self._forks], [], [], timeout)
            for fd, (pid, due) in list(self._forks.items()):
                if fd in ready or (time.monotonic() > due and _put_back(pid)):
                    del self._forks[fd]
                    os.close(fd)
            if control in ready:
                return

    def _backend(self, name: str) -> GrammarBackend | str:
        found: GrammarBackend | str | None = self._backends.get(name)
        if found is None:
            found = guarded(lambda: self._build(name), _reason)
            if not isinstance(found, str):  # what failed once may work the next time
                self._backends[name] = found
        return found

    def _build(self, name: str) -> GrammarBackend | str:
        start = self._start
        vocabulary = read_vocabulary(start.tokenizer, start.logits_width, start.eos_token_ids)
        backend: GrammarBackend = BACKENDS.load(name)(vocabulary)
        return backend


def _compile(backend: GrammarBackend, channel: socket.socket, memory_bytes: int) -> None:
    """In the fork; does not return."""
    os.setsid()  # what the kernel schedules as one, where it groups by session
    die_with_parent()
    channel.sendall(READY)
    stream = channel.makefile("rb")
    data = stream.read(int.from_bytes(stream.read(8), "little"))
    if not data:  # the engine is gone
        os._exit(1)
    job = msgspec.msgpack.decode(data, type=CompileJob)
    signal.setitimer(signal.ITIMER_REAL, job.seconds)  # SIGALRM ends a process that ignores none
    with open("/proc/self/statm", "rb") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    answer = guarded(
        lambda: COMPILED + backend.compile(job.spec),
        lambda error: REFUSED + _reason(error).encode(),
    )
    channel.sendall(answer)
    os._exit(0)


def _put_back(pid: int) -> bool:
    """Whether there is no more to do."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, _LAST)
        with open(f"/proc/{pid}/autogroup", "w") as group:
            group.write(str(_LAST))
    except BlockingIOError:  # another was put back just now
        return False
    except OSError:  # it ended, or the kernel has no such groups
        pass
    return True


def _reason(error: Exception) -> str:
    """One line of what the library says, without its own source lines."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, GrammarError) and "] " in text:  # "[time] file.cc:12: what"
        text = text.partition("] ")[2].partition(": ")[2]
    if "bad_alloc" in text or isinstance(error, MemoryError):
        return "it needs more memory than a grammar may have"
    lines = text.split("\n")
    return next((line for line in lines if line.startswith("error: ")), lines[0])[:_MAX_CHARS]


def main() -> int:
    """`python -m llmserve.structured_output.compile_server FD`."""
    CompileServer(receive_start(int(sys.argv[1]), CompilerStart)).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
