# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grammars through the compile server: in time, or not at all."""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.core.structured_outputs import GrammarKind, GrammarSpec, StructuredOutputsParams
from llmserve.errors import GrammarError, LLMServeError, OverloadedError
from llmserve.structured_output.base import CompiledGrammar
from llmserve.structured_output.compiler import _BUSY, GrammarCompiler
from llmserve.structured_output.prepare import prepare
from tests.helpers.clock import calibrate, in_time
from tests.helpers.grammar import closed_objects
from tests.helpers.server import is_alive, processes_of
from tests.helpers.tiny_models import EOS_ID, VOCAB_SIZE, write_tokenizer


def _spec(text: str, kind: GrammarKind = "regex", backend: str = "guidance") -> GrammarSpec:
    return GrammarSpec(backend=backend, kind=kind, text=text)


def _slow(name: str = "x", size: int = 20_000) -> GrammarSpec:
    """Minutes of work for xgrammar."""
    schema: Any = {"enum": [f"{name}{i}" + "x" * 20 for i in range(size)]}
    spec = prepare(StructuredOutputsParams(json=schema), "auto")
    assert spec.backend == "xgrammar"
    return spec


def _wait(compiler: GrammarCompiler, count: int = 1) -> dict[Any, CompiledGrammar | LLMServeError]:
    news: dict[Any, CompiledGrammar | LLMServeError] = {}
    end = time.monotonic() + 60
    while len(news) < count and time.monotonic() < end:
        select.select([compiler.wake_fd], [], [], 1)
        news |= dict(compiler.take_done())
    assert len(news) == count
    return news


def _one(compiler: GrammarCompiler, spec: GrammarSpec) -> CompiledGrammar | LLMServeError:
    assert compiler.get(spec) is None
    return _wait(compiler)[spec.key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def make(folder: Path) -> Iterator[Callable[..., GrammarCompiler]]:
    made: list[GrammarCompiler] = []

    def new(**options: Any) -> GrammarCompiler:
        made.append(GrammarCompiler(str(folder), VOCAB_SIZE, [EOS_ID], **options))
        return made[-1]

    yield new
    for compiler in made:
        compiler.close()


@pytest.fixture(scope="module")
def warm(make: Callable[..., GrammarCompiler]) -> GrammarCompiler:
    """Both engines loaded."""
    compiler = make(seconds=0.8)
    for name in ("guidance", "xgrammar"):
        assert isinstance(_one(compiler, _spec("warm", backend=name)), CompiledGrammar)
    return compiler


@pytest.mark.parametrize("backend", ["guidance", "xgrammar"])
def test_a_grammar_of_the_tokenizer_comes_back_and_is_kept(
    warm: GrammarCompiler, backend: str
) -> None:
    spec, before = _spec("[a-c]x", backend=backend), warm.num_compiled
    made = _one(warm, spec)
    assert isinstance(made, CompiledGrammar)
    words = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    matcher = made.start()
    matcher.fill(words)
    assert 0 < np.unpackbits(words.view(np.uint8))[:VOCAB_SIZE].sum() < 20
    assert warm.get(_spec("[a-c]x", backend=backend)) is made
    assert warm.num_compiled == before + 1


@pytest.mark.parametrize("parts", [(1, 1000), (100, 49)])
def test_as_many_properties_as_openai_allows(
    parts: tuple[int, int], make: Callable[..., GrammarCompiler]
) -> None:
    """5,000; what xgrammar compiles of a thousand takes gigabytes."""
    spec = prepare(StructuredOutputsParams(json=closed_objects(*parts)), "auto", seconds=60)
    assert isinstance(_one(make(), spec), CompiledGrammar)


def test_equal_grammars_are_compiled_once(warm: GrammarCompiler) -> None:
    before = warm.num_compiled
    assert warm.get(_spec("once")) is None and warm.get(_spec("once")) is None
    _wait(warm)
    assert warm.num_compiled == before + 1


def test_the_deadline_ends_the_compiler_not_the_server(warm: GrammarCompiler) -> None:
    assert warm._forks.child is not None
    began, server = time.monotonic(), warm._forks.child.process.pid
    result, took = _one(warm, _slow()), time.monotonic() - began
    if isinstance(result, GrammarError):
        assert "0.8 seconds" in result.message
    else:  # others had the cores
        assert isinstance(result, OverloadedError) and took > 0.8
    in_time(took, 0.8 * _BUSY + calibrate())
    time.sleep(0.1)
    assert processes_of(server) == [server], "a compiler goes on"
    assert isinstance(_one(warm, _spec("afterwards", backend="xgrammar")), CompiledGrammar)


def test_what_takes_long_gives_way(make: Callable[..., GrammarCompiler]) -> None:
    compiler = make(seconds=60.0)
    _one(compiler, _spec("warm"))
    assert compiler._forks.child is not None
    server, seen = compiler._forks.child.process.pid, list[tuple[int, bool, int]]()
    assert compiler.get(_slow("z")) is None
    while not seen or seen[-1][2] != 19:
        for pid in processes_of(server)[1:]:
            with contextlib.suppress(ProcessLookupError):
                seen.append((pid, os.getsid(pid) == pid, os.getpriority(os.PRIO_PROCESS, pid)))
        time.sleep(0.02)
    compiler.close()
    assert len({pid for pid, *_ in seen}) == 1
    assert {own[1:] for own in seen} >= {(True, 5), (True, 19)}


def test_many_hostile_ones_end_together(
    warm: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    run, specs = warm._run, [_slow(f"y{i}") for i in range(6)]

    def note(channel: socket.socket, spec: GrammarSpec, seconds: float) -> bytes | None:
        given.append(seconds)
        return run(channel, spec, seconds)

    monkeypatch.setattr(warm, "_run", note)
    began = time.monotonic()
    for spec in specs:
        assert warm.get(spec) is None
    kinds, took = {type(result) for result in _wait(warm, 6).values()}, time.monotonic() - began
    in_time(took, 2.5 * calibrate())
    assert kinds | {GrammarError} == {GrammarError, OverloadedError}, "who never ran may try again"
    assert min(given[:2]) > 0.2 and max(given[2:]) < 0.1, "the first two had their time"


def test_ordinary_ones_wait_for_each_other_but_share_after_a_timeout(
    make: Callable[..., GrammarCompiler], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = make(seconds=0.3)
    _one(compiler, _spec("warm"))
    given: list[float] = []

    def run(channel: object, spec: GrammarSpec, seconds: float) -> bytes | None:
        given.append(seconds)
        time.sleep(0.1)
        return None if "hostile" in spec.text else b""

    monkeypatch.setattr(compiler, "_run", run)
    specs = [_spec(f"ordinary{i}") for i in range(12)]
    for spec in [*specs, _spec("hostile"), _spec("late1"), _spec("late2"), _spec("late3")]:
        assert compiler.get(spec) is None
    results = _wait(compiler, 16)
    assert all(isinstance(results[spec.key], CompiledGrammar) for spec in specs)
    assert max(given) > 0.25 and min(given[:13]) == pytest.approx(0.1)
    assert isinstance(results[_spec("hostile").key], OverloadedError), "it had to wait too"
    assert given[-1] == 0.01


def test_memory_has_a_limit(make: Callable[..., GrammarCompiler]) -> None:
    result = _one(make(seconds=20.0, memory_bytes=32 << 20), _slow())
    assert isinstance(result, GrammarError) and "memory" in result.message


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (_spec("(a(?=b))"), "look-around"),
        (_spec("(" * 60_000 + ")" * 60_000), "nested"),
        (_spec('root ::= "a', "ebnf", "xgrammar"), "string literal, at line 1, column 12"),
        (_spec("start: x", "lark"), "x"),
    ],
)
def test_what_the_library_says_is_one_line(
    warm: GrammarCompiler, spec: GrammarSpec, said: str
) -> None:
    result = _one(warm, spec)
    assert isinstance(result, GrammarError)
    assert said in result.message and "\n" not in result.message and ".cc:" not in result.message


def test_a_server_that_died_is_started_again(warm: GrammarCompiler) -> None:
    assert warm._forks.child is not None
    os.kill(warm._forks.child.process.pid, signal.SIGKILL)
    warm._forks.child.process.wait()
    assert isinstance(_one(warm, _spec("again")), CompiledGrammar)


def test_the_cache_forgets_what_was_used_least(make: Callable[..., GrammarCompiler]) -> None:
    compiler = make(cache_bytes=130 << 10)  # two grammars of the least size that is counted
    a, b, c = _spec("a"), _spec("b"), _spec("c")
    for spec in (a, b):
        _one(compiler, spec)
    assert compiler.get(a) is not None
    _one(compiler, c)
    assert compiler.get(a) is not None and compiler.get(b) is None
    _wait(compiler)


def test_close_leaves_nothing_behind(make: Callable[..., GrammarCompiler]) -> None:
    compiler = make()
    _one(compiler, _spec("a"))
    assert compiler._forks.child is not None
    pid = compiler._forks.child.process.pid
    compiler.close()
    compiler.close()
    assert not is_alive(pid)


def test_close_ends_what_is_being_compiled(make: Callable[..., GrammarCompiler]) -> None:
    compiler = make(seconds=20.0)
    _one(compiler, _spec("a", backend="xgrammar"))
    assert compiler._forks.child is not None and compiler.get(_slow()) is None
    found: list[int] = []
    end = time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < end:
        found = processes_of(compiler._forks.child.process.pid)
    assert len(found) == 2
    time.sleep(0.1)
    compiler.close()
    end = time.monotonic() + 2
    while any(map(is_alive, found)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_alive, found))


def test_nothing_is_started_before_the_first_grammar(
    make: Callable[..., GrammarCompiler],
) -> None:
    compiler = make()
    assert compiler.take_done() == [] and compiler._forks.child is None


def test_a_tokenizer_without_bytes_refuses_every_grammar(tmp_path: Path) -> None:
    compiler = GrammarCompiler(str(tmp_path), VOCAB_SIZE, [EOS_ID])
    try:
        assert isinstance(_one(compiler, _spec("a")), LLMServeError)
    finally:
        compiler.close()
