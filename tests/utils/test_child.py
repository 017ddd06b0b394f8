# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from llmserve.utils.child import Child, make_run_dir, send_start


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
