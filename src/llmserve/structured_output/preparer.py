# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`prepare` for a process that has others to answer: what takes long is done in a fork of a child.

A thread would not do: it has the interpreter's lock again and again, and the event loop waits for
it at each of its turns.
"""

import asyncio
import contextlib
import gc
import sys
import time

import msgspec

from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import OverloadedError, RequestError
from llmserve.structured_output.prepare import TooLong, prepare
from llmserve.utils.child import receive_start
from llmserve.utils.forks import Forks, ForkServer

_JOB = "prepare"  # the child knows no other
SECONDS = 1.0  # with the wait for a turn; a fork that has a core needs a third
_FORKS = 2  # at once
_MEMORY_BYTES = 512 << 20
_QUICK_S = 0.01  # in this process
_QUICK_BYTES = 8 << 10  # to be walked in as little
_MAX_KNOWN = 256  # grammars
_MAX_KNOWN_BYTES = 16 << 10  # of what was asked for one


class PreparerStart(msgspec.Struct):
    """`control` is an inherited socket on which each job's socket comes."""

    control: int


class _Task(msgspec.Struct, array_like=True):
    params: StructuredOutputsParams
    backend: str


class _Outcome(msgspec.Struct, omit_defaults=True):
    """`message` says why there is no `spec`."""

    spec: GrammarSpec | None = None
    message: str = ""
    param: str | None = None
    code: str | None = None


class Preparer:
    """Of an event loop. Nothing is started before something takes long; `close` ends everything.
    What is asked for again and again, as a program's schema is, is prepared once."""

    def __init__(self) -> None:
        self._known: dict[bytes, GrammarSpec] = {}  # by what was asked for
        self._forks = Forks("llmserve.structured_output.preparer", PreparerStart)
        self._quick_turn = asyncio.Semaphore(1)  # with more, the loop waits for each of them
        self._turn = asyncio.Semaphore(_FORKS)

    async def prepare(self, params: StructuredOutputsParams, backend: str) -> GrammarSpec:
        """See `prepare`; OverloadedError where that took too long beside others."""
        arrival = time.monotonic()
        data = _encode(params, backend)
        if (known := self._known.get(data)) is not None:
            return known
        if len(data) <= _QUICK_BYTES:
            with contextlib.suppress(TooLong):
                async with self._quick_turn:
                    spec = await asyncio.to_thread(prepare, params, backend, _QUICK_S)
                return self._remember(data, spec)
        async with self._turn:
            outcome = await asyncio.to_thread(self._outcome, data, arrival)
        if outcome.spec is None:
            raise RequestError(outcome.message, param=outcome.param, code=outcome.code)
        return self._remember(data, outcome.spec)

    def prepare_here(self, params: StructuredOutputsParams, backend: str) -> GrammarSpec:
        """The same in this process, for who has nobody else to answer."""
        try:
            data = _encode(params, backend)
        except (TypeError, ValueError, RecursionError):  # of a Python caller: no JSON at all
            return prepare(params, backend)
        return self._known.get(data) or self._remember(data, prepare(params, backend))

    def _remember(self, data: bytes, spec: GrammarSpec) -> GrammarSpec:
        if len(data) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[data] = spec
        return spec

    def _outcome(self, data: bytes, arrival: float) -> _Outcome:
        answer = None
        if (left := self._left(arrival)) > 0:  # else not even a fork: there may be many
            with contextlib.suppress(OSError), self._forks.open(_JOB) as channel:  # the child ended
                self._forks.wait_ready(_JOB, channel, left)
                if (left := self._left(arrival)) > 0:
                    answer = self._forks.run(channel, data, left)
        if answer is None:
            raise OverloadedError("too many grammars are being prepared")
        return msgspec.msgpack.decode(answer, type=_Outcome)

    def _left(self, arrival: float) -> float:
        """Of the seconds of a request; those in which the child starts do not count."""
        return SECONDS - (time.monotonic() - max(arrival, self._forks.ready_since(_JOB)))

    def close(self) -> None:
        """Idempotent."""
        self._forks.close()


def _encode(params: StructuredOutputsParams, backend: str) -> bytes:
    return msgspec.json.encode(_Task(params, backend))  # MessagePack has no long integers


def _prepare(data: bytes) -> bytes:
    gc.disable()  # it would look at all of a large schema again and again
    task = msgspec.json.decode(data, type=_Task)
    try:
        outcome = _Outcome(prepare(task.params, task.backend))
    except RequestError as error:
        outcome = _Outcome(None, error.message, error.param, error.code)
    return msgspec.msgpack.encode(outcome)


def main() -> int:
    """`python -m llmserve.structured_output.preparer FD`."""
    start = receive_start(int(sys.argv[1]), PreparerStart)
    ForkServer(start.control, lambda name: _prepare, ordinary=0.1, memory_bytes=_MEMORY_BYTES).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
