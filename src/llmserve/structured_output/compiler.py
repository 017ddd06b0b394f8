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
from llmserve.structured_output.closing import Closing
from llmserve.structured_output.compile_server import (
    COMPILED,
    CompilerStart,
)
from llmserve.structured_output.free_strings import FreeStrings
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import Vocabulary, read_vocabulary
from llmserve.structured_output.whitespace import Whitespace
from llmserve.utils.forks import Forks
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

SECONDS = 2.0  # to compile a grammar
_BUSY = 1.25  # times as long may it take where others have the cores
MEMORY_BYTES = 1 << 30  # that compiling one may allocate
WORKERS = 2  # grammars compiled at once
MAX_COMPILED_BYTES = 64 << 20  # of one grammar
CACHE_BYTES = 256 << 20
_MIN_ENTRY_BYTES = 64 << 10  # a grammar that crosses as little text takes memory all the same

Key = tuple[str, str, bool, str]
Result = CompiledGrammar | LLMServeError


class Tables:
    """What masks are made with beside the grammars, from the vocabulary alone."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.closing = Closing(vocabulary)
        self.whitespace = Whitespace(vocabulary)
        self.strings = FreeStrings(vocabulary)


class GrammarCompiler:
    """Compiles in a child and loads in a thread; nothing is started before the first grammar.

    `tables` are there once a grammar is. `wake_fd` becomes readable when `take_done` has
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
        self._tokenizer = tokenizer
        self._logits_width = logits_width
        self._forks = Forks(
            "llmserve.structured_output.compile_server",
            lambda fd: CompilerStart(fd, tokenizer, logits_width, eos_token_ids, memory_bytes),
        )
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[Key, tuple[CompiledGrammar, int]] = OrderedDict()
        self._used = 0
        self._running: set[Key] = set()
        self._done: deque[tuple[Key, Result, int]] = deque()
        self._threads = ThreadPoolExecutor(WORKERS, "grammar")
        self._last_timeout = 0.0
        self._lock = threading.Lock()  # of the next two
        self.tables: Tables | None = None
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
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._forks.close()

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
        with self._forks.open(spec.backend) as channel:
            backend = self._backend(spec.backend)  # while the child starts
            arrival = max(arrival, self._forks.wait_ready(spec.backend, channel))
            waited = time.monotonic() - arrival
            left = self._seconds - waited
            # Many ordinary grammars may wait for each other; behind one that ran into the deadline
            # everybody shares it, so that an attack is over soon, however many come
            if self._last_timeout < arrival:
                left = max(left, self._seconds / 3)
            compiled = self._run(channel, spec, max(left, 0.01))
        if compiled is None:
            self._last_timeout = time.monotonic()
            took = self._last_timeout - arrival
            if waited > self._seconds / 2 or took > (1 + _BUSY) / 2 * self._seconds:
                raise OverloadedError("too many grammars are being compiled")
            raise GrammarError(
                f"compiling took more than {self._seconds:g} seconds or "
                "more memory than a grammar may have"
            )
        return backend.load(spec, compiled), len(compiled)

    def _run(self, channel: socket.socket, spec: GrammarSpec, seconds: float) -> bytes | None:
        """What the fork made of it; None if it gave no answer."""
        data = msgspec.msgpack.encode(spec)
        answer = self._forks.run(channel, data, _BUSY * seconds, on_core=seconds)
        if answer is None:
            return None
        if answer[:1] != COMPILED:
            raise GrammarError(answer[1:].decode("utf-8", "replace"))
        if len(answer) > MAX_COMPILED_BYTES:
            raise GrammarError(
                f"the compiled grammar has {len(answer) >> 20} MiB; at most "
                f"{MAX_COMPILED_BYTES >> 20} are allowed"
            )
        return answer[1:]

    def _backend(self, name: str) -> GrammarBackend:
        with self._lock:
            if name not in self._backends:
                if self.tables is None:
                    self.tables = Tables(
                        read_vocabulary(self._tokenizer, self._logits_width, self.eos_token_ids)
                    )
                self._backends[name] = BACKENDS.load(name)(self.tables.vocabulary)
            return self._backends[name]


def _failure(error: Exception) -> tuple[Result, int]:
    if isinstance(error, LLMServeError):
        return error, 0
    logger.error("a grammar could not be compiled", exc_info=error)
    return LLMServeError("the grammar compiler failed"), 0
