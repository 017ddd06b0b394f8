# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import subprocess
import sys

import pytest

from llmserve.cli.bench import startup
from llmserve.cli.client import Client
from llmserve.errors import LLMServeError
from tests.helpers.fake_openai import fake_openai


def process(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code])


def test_phases_of_a_server_that_is_there() -> None:
    server = process("import time; time.sleep(30)")
    try:
        with fake_openai(first_s=0.1) as fake:
            phases = startup.first_token(Client(fake.url), server, 5.0)
    finally:
        server.kill()
        server.wait()
    assert 0 <= phases["ready"] < 0.1 <= phases["first_token"] < 1.0


def test_a_server_that_ends_is_not_waited_for() -> None:
    client = Client(f"http://127.0.0.1:{startup.free_port()}")
    server = process("raise SystemExit(3)")
    with pytest.raises(LLMServeError, match="ended with code 3"):
        startup.first_token(client, server, 20.0)
    server = process("import time; time.sleep(30)")
    try:
        with pytest.raises(LLMServeError, match=r"not ready in 0.1 s"):
            startup.first_token(client, server, 0.1)
    finally:
        server.kill()
        server.wait()
