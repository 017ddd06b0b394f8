# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llmserve import envs
from tests.house.rules import ROOT

# Found by the interpreter before it runs anything of ours.
SITE = """
import os, sys

class Finder:
    def find_spec(name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder)
"""


def _heed_sigint() -> None:
    """In a child: who starts tests in the background has it ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _installed() -> list[str]:
    """What the program that an installation makes runs."""
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["llmserve"]
    module, _, name = target.partition(":")
    return ["-c", f"import sys; from {module} import {name}; sys.exit({name}())"]


@pytest.mark.parametrize("program", [["-m", "llmserve"], _installed()], ids=["module", "script"])
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [("serve", signal.SIGINT, 0), ("serve", signal.SIGTERM, 0), ("chat", signal.SIGINT, 130)],
)
@pytest.mark.parametrize("module", ["llmserve.cli", "argparse", "llmserve.cli.{command}"])
def test_a_signal_while_it_imports(
    program: list[str], command: str, number: int, code: int, module: str, tmp_path: Path
) -> None:
    """From the first import to those of the command."""
    site = SITE.format(module=module.format(command=command), number=int(number))
    (tmp_path / "sitecustomize.py").write_text(site)
    run = subprocess.run(
        [sys.executable, *program, command],
        env=envs.child_environment(PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}"),
        preexec_fn=_heed_sigint, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (code, "", "")


def test_nothing_is_imported_before_signals_are_dealt_with() -> None:
    code = "import sys; before = {*sys.modules}; import llmserve; print({*sys.modules} - before)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=envs.child_environment(PYTHONPATH=str(ROOT / "src")),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.stdout.strip() == "{'llmserve'}", run.stderr
