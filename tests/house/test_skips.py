# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A skip that is not listed fails the run, whether of a test or of a whole file; a missed deadline
does not where it is kept the second time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.rules import ROOT

TESTS = """
import pytest

def test_passes(): ...

def test_skips():
    pytest.skip("no reason given")

@pytest.mark.xfail
def test_known(): assert False
"""


LATE = """
import pytest
from tests.helpers.clock import in_time

took = {"once": [9.0, 0.0], "twice": [9.0, 9.0]}

@pytest.mark.parametrize("name", took)
async def test_late(name, tmp_path):
    in_time(took[name].pop(0), 1.0)

def test_wrong():
    took["once"].append(0)
    assert took["once"] == []
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """pytest on a folder with this project's conftest.py; the last lines."""
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text().replace("Path(__file__).parent", "Path('.')")
    )
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "skips.txt").write_text("test_a.py::test_listed why\n")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}

    def pytest_run(*arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
        )
        return done.stdout.splitlines()

    return pytest_run


def test_unlisted_skips_fail(tmp_path: Path, run: Callable[..., list[str]]) -> None:
    (tmp_path / "test_a.py").write_text(TESTS.replace("test_skips", "test_listed"))
    assert run()[-1].startswith("1 passed, 1 skipped, 1 xfailed")
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import pytest\npytest.importorskip('no_such_package')")
    assert "1 error" in run()[-1]
    (tmp_path / "test_b.py").unlink()
    assert run()[-1].startswith("1 failed, 1 passed, 1 xfailed")


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_missed_deadline_has_a_second_chance(
    tmp_path: Path, run: Callable[..., list[str]], workers: list[str]
) -> None:
    (tmp_path / "test_a.py").write_text(LATE)
    lines = run("-o", "asyncio_mode=auto", *workers)
    assert lines[-1].startswith("2 failed, 1 passed")
    late = {line for line in lines if line.startswith("test_a.py::")}
    assert late == {f"test_a.py::test_late[{n}]: 9.00 s, over 1.00" for n in ("once", "twice")}
