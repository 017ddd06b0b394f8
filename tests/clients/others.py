# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Clients that cannot live in our own environment: `make test-clients` installs and runs them.

Each is a program that gets the addresses of a server and of one whose model thinks, and fails where
an answer is not as it should be.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.server import Server

HERE = Path(__file__).parent
THEIRS = HERE.parents[1] / ".venv-clients"
PROGRAMS = {
    "use_instructor.py": [str(THEIRS / "bin" / "python"), "-W", "ignore"],
    "use_litellm.py": [str(THEIRS / "bin" / "python"), "-W", "ignore"],
    "use_openai_node.cjs": ["node"],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(server: Server, thinker: Server, name: str) -> None:
    run = subprocess.run(
        [*PROGRAMS[name], str(HERE / name), f"{server.url}/v1", f"{thinker.url}/v1"],
        env=os.environ | {"NODE_PATH": str(THEIRS / "node_modules")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("all is well\n"), run.stdout
