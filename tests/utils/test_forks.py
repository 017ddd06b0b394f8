# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Jobs in forks; how long ones give way, and how forks end, is in structured_output."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmserve.utils.child import Child
from llmserve.utils.forks import _HEADER, Forks
from tests.helpers.clock import in_time
from tests.helpers.server import processes_of

MODULE = """
import sys, time
from llmserve.utils.child import receive_start
from llmserve.utils.forks import ForkServer

def work(data):
    if data == b"fail":
        raise ValueError("it fails")
    if data == b"much":
        data = bytes(256 << 20)
    time.sleep(len(data) / 10 if data.startswith(b"s") else 0)
    end = time.process_time() + (len(data) / 10 if data.startswith(b"b") else 0)
    while time.process_time() < end:
        pass
    return data[::-1]

def work_of(name):
    return work if name == "known" else b"unknown " + name.encode()

ForkServer(receive_start(int(sys.argv[1]), int), work_of, ordinary=0.1, memory_bytes=1 << 26).run()
"""


@pytest.fixture
def forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Forks]:
    (tmp_path / "forking.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = Forks("forking", lambda fd: fd)
    yield made
    made.close()


@pytest.fixture
def ask(forks: Forks) -> Callable[..., bytes | None]:
    def ask(data: bytes, seconds: float = 5.0, name: str = "known") -> bytes | None:
        with forks.open(name) as channel:
            forks.wait_ready(name, channel)
            return forks.run(channel, data, seconds)

    return ask


def test_each_job_is_answered(forks: Forks, ask: Callable[..., bytes | None]) -> None:
    assert forks.child is None, "nothing before the first"
    assert ask(b"abc") == b"cba" and ask(b"x" * 3_000_000) == b"x" * 3_000_000
    assert ask(b"abc", name="other") == b"unknown other"


@pytest.mark.parametrize("data", [b"ssssssssss", b"fail", b"much"])
def test_no_answer_from_one_that_fails(ask: Callable[..., bytes | None], data: bytes) -> None:
    assert ask(b"ab") == b"ba"
    began = time.monotonic()
    assert ask(data, 0.3) is None
    in_time(time.monotonic() - began, 0.9)
    assert ask(b"ab") == b"ba", "others go on"


def test_time_on_a_core_is_bound_by_itself(forks: Forks, ask: Callable[..., bytes | None]) -> None:
    """One that only has to wait does not use it up, nor does it give way for it."""
    nice = dict[bytes, int]()
    for data, answer in ((b"bbbbbbbbbb", None), (b"ssss", b"ssss")):
        with forks.open("known") as channel, ThreadPoolExecutor(1) as pool:
            forks.wait_ready("known", channel)
            run = pool.submit(forks.run, channel, data, 20.0, on_core=0.3)
            assert forks.child is not None
            while not run.done():
                for pid in processes_of(forks.child.process.pid)[1:]:
                    with contextlib.suppress(ProcessLookupError):
                        nice[data] = os.getpriority(os.PRIO_PROCESS, pid)
                time.sleep(0.01)
            assert run.result() == answer
    assert [*nice.values()] == [19, 5]


def test_an_answer_is_whole_though_its_time_ends(forks: Forks) -> None:
    with forks.open("known") as channel:
        forks.wait_ready("known", channel)
        data = b"x" * 3_000_000
        channel.sendall(_HEADER.pack(0.3, 0.0, len(data)) + data)
        time.sleep(0.6)  # it cannot write on
        answer = bytearray()
        while part := channel.recv(1 << 20):
            answer += part
    assert answer == data


def test_jobs_run_beside_each_other(forks: Forks, ask: Callable[..., bytes | None]) -> None:
    with forks.open("known") as abandoned:
        forks.wait_ready("known", abandoned)
        assert ask(b"ab") == b"ba"
    assert ask(b"ab") == b"ba", "nor does one that was given up matter"


def test_a_child_that_died_is_started_again(forks: Forks, ask: Callable[..., bytes | None]) -> None:
    ask(b"ab")
    assert isinstance(forks.child, Child)
    os.kill(forks.child.process.pid, signal.SIGKILL)
    forks.child.process.wait()
    assert ask(b"ab") == b"ba"


def test_one_that_ends_at_its_start_is_an_error(tmp_path: Path) -> None:
    forks = Forks("timeit", lambda fd: fd)  # any module that knows nothing of jobs
    with forks.open("a") as channel, pytest.raises(ConnectionError):
        forks.wait_ready("a", channel)
    forks.close()
