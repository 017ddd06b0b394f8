# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The process in which grammars are compiled: one fork a grammar. The server holds the libraries
and the vocabulary."""

import sys
from functools import partial

import msgspec

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import GrammarError
from llmserve.structured_output.base import GrammarBackend
from llmserve.structured_output.refusal import MEMORY, refusal
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import read_vocabulary
from llmserve.utils.child import receive_start
from llmserve.utils.forks import ForkServer, Work
from llmserve.utils.guard import guarded

COMPILED = b"c"
REFUSED = b"e"
_ORDINARY_S = 0.3  # ordinary grammars, on a busy core too


class CompilerStart(msgspec.Struct):
    """`control` is an inherited socket on which each job's socket comes with its backend's name."""

    control: int
    tokenizer: str
    logits_width: int
    eos_token_ids: list[int]
    memory_bytes: int  # that a fork may allocate


class Backends:
    """What is asked to compile, loaded when it first is."""

    def __init__(self, start: CompilerStart) -> None:
        self._start = start
        self._found: dict[str, GrammarBackend] = {}

    def work_of(self, name: str) -> Work | bytes:
        """What compiles a GrammarSpec, or why nothing can."""
        if name not in self._found:
            made: GrammarBackend | str = guarded(lambda: self._build(name), _failure)
            if isinstance(made, str):  # what failed once may work the next time
                return REFUSED + made.encode()
            self._found[name] = made
        return partial(_compile, self._found[name])

    def _build(self, name: str) -> GrammarBackend | str:
        start = self._start
        vocabulary = read_vocabulary(start.tokenizer, start.logits_width, start.eos_token_ids)
        backend: GrammarBackend = BACKENDS.load(name)(vocabulary)
        return backend


def _compile(backend: GrammarBackend, data: bytes) -> bytes:
    spec = msgspec.msgpack.decode(data, type=GrammarSpec)
    return guarded(
        lambda: COMPILED + backend.compile(spec),
        lambda error: REFUSED + refusal(spec, _reason(error)).encode("utf-8", "replace"),
    )


def _failure(error: Exception) -> str:
    return str(error) if isinstance(error, GrammarError) else "the grammar engine cannot be loaded"


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return MEMORY if "bad_alloc" in text or isinstance(error, MemoryError) else text


def main() -> int:
    """`python -m llmserve.structured_output.compile_server FD`."""
    start = receive_start(int(sys.argv[1]), CompilerStart)
    work_of = Backends(start).work_of
    ForkServer(start.control, work_of, ordinary=_ORDINARY_S, memory_bytes=start.memory_bytes).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
