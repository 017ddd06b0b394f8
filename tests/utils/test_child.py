# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmserve import envs
from llmserve.errors import ConfigError
from llmserve.utils.child import (
    WHEN_STUCK,
    Child,
    dump_stacks,
    make_run_dir,
    send_start,
    sweep_run_dirs,
)


def test_run_dir_is_private() -> None:
    path = Path(make_run_dir())
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.rmdir()


CHILD = """
    import sys, subprocess, time
    from llmserve.utils.child import receive_start
    start = receive_start(int(sys.argv[1]), dict)
    grandchild = subprocess.Popen(["sleep", "60"])
    open(start["path"], "w").write(str(grandchild.pid))
    time.sleep(60)
"""


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_child_and_grandchild_die_with_their_parent(tmp_path: Path) -> None:
    """The start socket's end of file is the parent's death."""
    ours, theirs = socket.socketpair()
    report = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    theirs.close()
    send_start(ours, {"path": str(report)})
    deadline = time.monotonic() + 10
    while not (report.exists() and report.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = int(report.read_text())
    ours.close()
    process.wait(5)
    while not _gone(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _gone(grandchild)


def test_end_kills_a_child_that_does_not_listen() -> None:
    child = Child("timeit", {})  # any module that runs without reading its start message
    child.end(0.0)
    assert not child.alive()


STUCK = """
    import sys, time
    from llmserve.utils.child import receive_start
    start = receive_start(int(sys.argv[1]), dict)
    open(start["path"], "w").write("1")
    time.sleep(60)
"""
PARENT = """
    import sys, threading, time
    from llmserve.utils.child import Child
    child = Child("stuck", {"path": sys.argv[1]})
    print(child.process.pid, flush=True)
    time.sleep(60)
"""


def _wait(done: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    """No thread of it could notice."""
    (tmp_path / "stuck.py").write_text(textwrap.dedent(STUCK))
    report = tmp_path / "up"
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), str(tmp_path)])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(report)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        _wait(report.exists)
        os.kill(child, signal.SIGSTOP)
        parent.kill()
    _wait(lambda: _gone(child), 3.0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, WHEN_STUCK])
def test_signals_are_sent_to_those_that_write_stacks_alone(tmp_path: Path, number: int) -> None:
    ours, theirs = socket.socketpair()
    report = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    ) as process:
        theirs.close()
        send_start(ours, {"path": str(report)})
        _wait(lambda: report.exists() and report.read_text())
        sleep = int(report.read_text())
        assert dump_stacks(process.pid, number) == [process.pid]  # and not `sleep`, which would die
        assert process.stderr is not None
        text = process.stderr.readline()
        while "Current thread" not in text:
            text = process.stderr.readline()
        assert process.poll() is None and not _gone(sleep)
        ours.close()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """As sockets need it: pytest's own is longer by the name of the test."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def test_folders_of_killed_owners_are_removed(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envs, "RUNTIME_DIR", short_path)
    own = make_run_dir()
    left, fresh, other = (short_path / f"llmserve-{name}" for name in ("left", "fresh", "other"))
    for folder in (left, fresh, other):
        folder.mkdir()
    (left / "engine-0.sock").touch()
    (short_path / "file").touch()
    os.utime(other, (0, 0))
    sweep_run_dirs()
    assert {path.name for path in short_path.iterdir()} == {
        Path(own).name,
        "llmserve-fresh",
        "file",
    }


def test_a_folder_too_deep_for_sockets_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(envs, "RUNTIME_DIR", deep)
    with pytest.raises(ConfigError, match=f"folder for sockets in {deep}: too long a path"):
        make_run_dir()
    assert not list(deep.iterdir())


@pytest.mark.parametrize("sent", [b"", b"\x05\0\0", b"\x05\0\0\0\0\0\0\0\1ab"], ids=len)
def test_a_start_that_breaks_off_ends_the_child_silently(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    code = "import sys; from llmserve.utils.child import *; receive_start(int(sys.argv[1]), dict)"
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env=envs.child_environment(), stderr=subprocess.PIPE,
        )  # fmt: skip
    ours.sendall(sent)
    ours.close()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said == b""
