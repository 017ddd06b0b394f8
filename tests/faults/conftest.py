# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The shared bench, and the second chance of a row that only a deadline failed."""

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.helpers.faults import Bench, TooSlow, write_bench_model

_rerun: list[str] = []


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; its logits are wider than its tokenizer."""
    return write_bench_model(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def bench(bench_model: Path) -> Iterator[Bench]:
    """One server for all rows that leave it running."""
    sys.setswitchinterval(5e-4)  # what reads streams and probes has its clock in this process
    with Bench(bench_model) as started:
        yield started


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    try:
        return (yield)
    except TooSlow as error:
        _rerun.append(f"{pyfuncitem.nodeid}: {error}")
    names = pyfuncitem._fixtureinfo.argnames
    pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _rerun:
        terminalreporter.section("rows that missed a deadline and were run alone once more")
        for line in _rerun:
            terminalreporter.write_line(line)
