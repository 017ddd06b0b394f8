# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A skip that is not listed fails the run, whether of a test or of a whole file."""

import subprocess
import sys
from pathlib import Path

from tests.house.rules import ROOT

TESTS = """
import pytest

def test_passes(): ...

def test_skips():
    pytest.skip("no reason given")

@pytest.mark.xfail
def test_known(): assert False
"""


def test_unlisted_skips_fail(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        (ROOT / "tests" / "conftest.py").read_text().replace("Path(__file__).parent", "Path('.')")
    )
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "skips.txt").write_text("test_a.py::test_listed why\n")
    (tmp_path / "test_a.py").write_text(TESTS.replace("test_skips", "test_listed"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def summary() -> str:
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return run.stdout.splitlines()[-1]

    assert summary().startswith("1 passed, 1 skipped, 1 xfailed")
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import pytest\npytest.importorskip('no_such_package')")
    assert "1 error" in summary()
    (tmp_path / "test_b.py").unlink()
    assert summary().startswith("1 failed, 1 passed, 1 xfailed")
