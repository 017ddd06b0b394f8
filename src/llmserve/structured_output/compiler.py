# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine's end of the compile server: grammars by content, within a deadline."""

import contextlib
import os
import socket
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor

import msgspec

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import GrammarError, LLMServeError, OverloadedError
from llmserve.structured_output.base import CompiledGrammar, GrammarBackend
from llmserve.structured_output.compile_server import (
    COMPILED,
    READY,
    CompileJob,
    CompilerStart,
)
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import Vocabulary, read_vocabulary
from llmserve.utils.child import Child
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

SECONDS = 2.0  # to compile a grammar
MEMORY_BYTES = 1 << 30  # that compiling one may allocate
WORKERS = 2  # grammars compiled at once
MAX_COMPILED_BYTES = 64 << 20  # of one grammar
CACHE_BYTES = 256 << 20
_MIN_ENTRY_BYTES = 64 << 10  # a grammar that crosses as little text takes memory all the same
_START_SECONDS = 60.0  # for a server to import a library

Key = tuple[str, str, bool, str]
Result = CompiledGrammar | LLMServeError


class GrammarCompiler:
    """Compiles in a child and loads in a thread; nothing is started before the first grammar.

    `vocabulary` is there once a grammar is. `wake_fd` becomes readable when `take_done` has
    something. `close` ends everything.
    """

    def __init__(
        self,
        tokenizer: str,
        logits_width: int,
        eos_token_ids: list[int],
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.eos_token_ids = eos_token_ids
        self._start = CompilerStart(-1, tokenizer, logits_width, eos_token_ids, memory_bytes)
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Key, tuple[CompiledGrammar, int]] = OrderedDict()
        self._used = 0
        self._running: set[Key] = set()
        self._done: deque[tuple[Key, Result, int]] = deque()
        self._threads = ThreadPoolExecutor(WORKERS, "grammar")
        self._lock = threading.Lock()  # of what follows
        self._server: Child | None = None
        self._control: socket.socket | None = None
        self._warm: dict[str, float] = {}  # backend -> since when it answers at once
        self._last_timeout = 0.0
        self.vocabulary: Vocabulary | None = None
        self._backends: dict[str, GrammarBackend] = {}
        self._is_used = False
        self.num_compiled = 0

    def get(self, spec: GrammarSpec) -> CompiledGrammar | None:
        """The grammar if it is there; else it is on its way to `take_done`."""
        key = spec.key
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][0]
        if key not in self._running:
            self._is_used = True
            self._running.add(key)
            self._threads.submit(self._work, spec, time.monotonic())
        return None

    def take_done(self) -> list[tuple[Key, Result]]:
        """What was compiled, or why it could not be, since the last call."""
        if not self._is_used:
            return []
        # Read even without news: a thread that wrote it may have been overtaken by this call
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        news = []
        while self._done:
            key, result, size = self._done.popleft()
            self._running.discard(key)
            if isinstance(result, CompiledGrammar):
                self.num_compiled += 1
                self._keep(key, result, max(size, _MIN_ENTRY_BYTES))
            news.append((key, result))
        return news

    def close(self) -> None:
        """Ends the server and what it compiles; idempotent."""
        with self._lock:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._end_server()

    def _end_server(self) -> None:
        if self._server is not None and self._control is not None:
            self._control.close()
            self._server.end(0)
        self._server = self._control = None
        self._warm.clear()

    def _keep(self, key: Key, grammar: CompiledGrammar, size: int) -> None:
        self._cache[key] = grammar, size
        self._used += size
        while self._used > self._cache_bytes and len(self._cache) > 1:
            _, (_, freed) = self._cache.popitem(last=False)
            self._used -= freed

    # -- in a thread

    def _work(self, spec: GrammarSpec, arrival: float) -> None:
        result, size = guarded(lambda: self._compile(spec, arrival), _failure)
        self._done.append((spec.key, result, size))
        os.eventfd_write(self.wake_fd, 1)

    def _compile(self, spec: GrammarSpec, arrival: float) -> tuple[Result, int]:
        channel, theirs = socket.socketpair()
        with channel, theirs:
            with self._lock:
                socket.send_fds(self._connect(), [spec.backend.encode()], [theirs.fileno()])
            theirs.close()
            backend = self._backend(spec.backend)  # while the child starts
            channel.settimeout(_START_SECONDS)
            if channel.recv(1) != READY:
                raise ConnectionError("the compile server ended")
            now = time.monotonic()
            arrival = max(arrival, self._warm.setdefault(spec.backend, now))
            waited = now - arrival
            left = self._seconds - waited
            # Many ordinary grammars may wait for each other; behind one that ran into the deadline
            # everybody shares it, so that an attack is over soon, however many come
            if self._last_timeout < arrival:
                left = max(left, self._seconds / 3)
            compiled = self._run(channel, spec, max(left, 0.01))
        if compiled is None:
            self._last_timeout = time.monotonic()
            if waited > self._seconds / 2:
                raise OverloadedError("too many grammars are being compiled")
            raise GrammarError(
                f"compiling took more than {self._seconds:g} seconds or "
                "more memory than a grammar may have"
            )
        return backend.load(spec, compiled), len(compiled)

    def _run(self, channel: socket.socket, spec: GrammarSpec, seconds: float) -> bytes | None:
        """What the fork made of it; None if it gave no answer."""
        job = msgspec.msgpack.encode(CompileJob(spec, seconds))
        parts: list[bytes] = []
        channel.settimeout(seconds + 1)
        try:
            channel.sendall(len(job).to_bytes(8, "little") + job)
            while part := channel.recv(1 << 20):
                parts.append(part)
        except (TimeoutError, ConnectionError):
            return None
        answer = b"".join(parts)
        if not answer:
            return None
        if answer[:1] != COMPILED:
            raise GrammarError(answer[1:].decode("utf-8", "replace"))
        if len(answer) > MAX_COMPILED_BYTES:
            raise GrammarError(
                f"the compiled grammar has {len(answer) >> 20} MiB; at most "
                f"{MAX_COMPILED_BYTES >> 20} are allowed"
            )
        return answer[1:]

    def _connect(self) -> socket.socket:
        if self._server is not None and not self._server.alive():
            self._end_server()
        if self._server is None:
            control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with theirs:
                self._start.control = theirs.fileno()
                self._server = Child(
                    "llmserve.structured_output.compile_server", self._start, (theirs.fileno(),)
                )
            self._control = control
        assert self._control is not None
        return self._control

    def _backend(self, name: str) -> GrammarBackend:
        with self._lock:
            if name not in self._backends:
                if self.vocabulary is None:
                    start = self._start
                    self.vocabulary = read_vocabulary(
                        start.tokenizer, start.logits_width, start.eos_token_ids
                    )
                self._backends[name] = BACKENDS.load(name)(self.vocabulary)
            return self._backends[name]


def _failure(error: Exception) -> tuple[Result, int]:
    if isinstance(error, LLMServeError):
        return error, 0
    logger.error("a grammar could not be compiled", exc_info=error)
    return LLMServeError("the grammar compiler failed"), 0
