# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve import envs
from llmserve.kernels.compilations import Compilations
from llmserve.kernels.triton_jit import Card
from llmserve.worker import compile_ahead, compile_steps
from llmserve.worker.compile_ahead import CompileStart, StepCompilers
from llmserve.worker.compile_steps import compile_part
from tests.helpers.tiny_runner import describe_tiny

START = CompileStart(describe_tiny(), "bfloat16", Card("Card", 90, 132), 24, 160, 16)


class Process:
    """Ends with `code`."""

    started: list[CompileStart] = []
    code = 0

    def __init__(self, module: str, start: CompileStart, pass_fds: tuple[int, ...]) -> None:
        assert module == "llmserve.worker.compile_steps" and pass_fds == (start.report_fd,)
        os.write(start.report_fd, f"one-of-all\nof-{start.part[0]}".encode())
        self.started.append(start)
        self.process = self
        self.ended = False

    def wait(self, timeout: float) -> int:
        return self.code

    def end(self, timeout: float) -> None:
        self.ended = True


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(compile_ahead, "Child", Process)
    monkeypatch.setattr(compile_ahead, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setattr(Process, "started", [])

    def start(**changes: Any) -> int:
        """How many processes ran."""
        before = len(Process.started)
        fields = {name: getattr(START, name) for name in START.__struct_fields__}
        StepCompilers(CompileStart(**(fields | changes))).wait()
        return len(Process.started) - before

    return start


def test_only_what_was_not_compiled_before(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compilers() == 3
    assert [start.part for start in Process.started] == [(0, 3), (1, 3), (2, 3)]
    assert compilers() == 0
    for change in (
        {"max_rows": 25}, {"max_model_len": 161}, {"block_size": 32}, {"dtype": "float16"},
        {"card": Card("Card", 90, 114)}, {"description": describe_tiny("Gemma3ForCausalLM")},
    ):  # fmt: skip
        assert (compilers(**change), compilers(**change)) == (3, 0), change
    monkeypatch.setattr(compile_ahead, "kernels_id", lambda: "others")
    assert compilers() == 3


def test_a_process_that_fails_is_started_again_next_time(
    compilers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Process, "code", 1)
    assert (compilers(), compilers()) == (3, 3)
    monkeypatch.setattr(Process, "code", 0)
    assert (compilers(), compilers()) == (3, 0)


def test_what_the_processes_compiled_is_told(
    compilers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Compilations()
    monkeypatch.setattr(compile_ahead, "compilations", lambda: told)
    assert compilers() == 3
    assert told.compiled == {"one-of-all", "of-0", "of-1", "of-2"} and not told.found


def test_a_process_tells_what_it_has_compiled_even_if_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Compilations()
    monkeypatch.setattr(compile_steps, "compilations", lambda: made)

    def compile_some(*args: Any, **sizes: Any) -> None:
        made.compiled.update(("a", "b"))
        raise OSError("no space left")

    monkeypatch.setattr(compile_steps, "compile_steps", compile_some)
    report, theirs = os.pipe()
    with pytest.raises(OSError, match="no space"):
        compile_part(msgspec.structs.replace(START, report_fd=theirs))
    with open(report) as lines:
        assert sorted(lines.read().split()) == ["a", "b"]


def test_two_cores_are_left_to_the_start(compilers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3))
    assert compilers() == 0


if not envs.TRITON_INTERPRET:

    def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
        """Each kernel with its constants is compiled by one process, those of all steps by some."""
        from triton.runtime.jit import JITFunction

        seen: list[set[str]] = []

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            constants = [arg for arg in args if not hasattr(arg, "data_ptr")]
            seen[-1].add(repr((kernel.__name__, constants, sorted(options.items()))))
            raw = {"name": kernel.__name__, "metadata": type("Meta", (), {"shared": 0})}
            return type("Made", (), raw)

        monkeypatch.setattr(JITFunction, "run", run)
        for part in ((0, 1), (0, 3), (1, 3), (2, 3)):
            seen.append(set())
            fields = {name: getattr(START, name) for name in START.__struct_fields__}
            with open(os.devnull, "w") as sink:
                fd = os.dup(sink.fileno())
            compile_part(CompileStart(**(fields | {"part": part, "report_fd": fd})))
        whole, *parts = seen
        assert whole == set.union(*parts) and len(whole) > 20
        assert sum(map(len, parts)) == len(whole) and all(parts)
