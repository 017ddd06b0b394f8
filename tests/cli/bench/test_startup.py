# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def test_each_start_has_an_empty_home_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    homes: list[Path] = []

    class Server:
        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            assert command[2:4] == ["llmserve", "serve"]
            if env["HOME"] != os.environ["HOME"]:
                homes.append(Path(env["HOME"]))
                assert not any(homes[-1].iterdir())
                (homes[-1] / ".triton").mkdir()

        def terminate(self) -> None: ...

        def wait(self) -> None: ...

    monkeypatch.setattr(startup.subprocess, "Popen", Server)
    monkeypatch.setattr(startup, "first_token", lambda *args: {"ready": 2.0, "first_token": 3.0})
    out = tmp_path / "out.json"
    assert startup.run(["m", "--num-iters", "2", "--empty-home", "--output-json", str(out)]) == 0
    assert len(set(homes)) == 2 and not any(home.exists() for home in homes)
    assert json.loads(out.read_text())["mean"] == {"ready": 2.0, "first_token": 3.0}
    assert "mean         2.00             3.00" in capsys.readouterr().out
    homes.clear()
    assert startup.run(["m", "--num-iters", "1"]) == 0 and homes == []
