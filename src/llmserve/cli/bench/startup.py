# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve bench startup`: from exec to the first token over HTTP."""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve import envs
from llmserve.cli.args import parse_flags, take
from llmserve.cli.client import Client
from llmserve.config.engine import ENGINE_GROUPS
from llmserve.config.flag import check_all, flag, positive
from llmserve.config.server import ServerConfig
from llmserve.errors import LLMServeError

_POLL_S = 0.02


@dataclass(frozen=True)
class StartupBench:
    """How often."""

    num_iters: int = flag(3, "Starts measured.", check=positive)
    startup_timeout: float = flag(600.0, "Seconds before a start is given up.", check=positive)
    empty_home: bool = flag(
        False, "Start each time without what was compiled before: with a home that is empty."
    )
    output_json: str | None = flag(None, "File for the numbers.")

    def __post_init__(self) -> None:
        check_all(self)


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def first_token(
    client: Client, server: subprocess.Popen[bytes], timeout: float
) -> dict[str, float]:
    """Seconds until the server is ready and until it streamed a token."""
    start = time.perf_counter()
    while True:
        try:
            client.call("GET", "/health/ready")
            break
        except LLMServeError:
            if server.poll() is not None:
                raise LLMServeError(f"the server ended with code {server.returncode}") from None
            if time.perf_counter() - start > timeout:
                raise LLMServeError(f"the server was not ready in {timeout:g} s") from None
            time.sleep(_POLL_S)
    ready = time.perf_counter() - start
    body = {
        "model": client.model(), "prompt": "One", "max_tokens": 4, "temperature": 0,
        "return_token_ids": True,  # then a token without text, half a character, is an event too
    }  # fmt: skip
    with contextlib.closing(client.stream("/v1/completions", body)) as events:
        for event in events:
            if event["choices"]:
                return {"ready": ready, "first_token": time.perf_counter() - start}
    raise LLMServeError("the server answered without a token")


def run(argv: list[str]) -> int:
    """Starts the server again and again; prints the seconds of each phase."""
    flags = parse_flags(
        argv, (StartupBench, *ENGINE_GROUPS, ServerConfig), prog="llmserve bench startup",
        description="Seconds from exec of `llmserve serve` to its first token over HTTP.",
    )  # fmt: skip
    options = take(flags, StartupBench)
    runs: list[dict[str, float]] = []
    print(f"{'start':>6} {'ready (s)':>12} {'first token (s)':>16}")
    for number in range(options.num_iters):
        port = free_port()
        config: dict[str, Any] = flags | {"host": "127.0.0.1", "port": port}
        with (
            tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
            tempfile.TemporaryDirectory(prefix="home-") as home,
        ):
            environment = envs.empty_home(home) if options.empty_home else {}
            json.dump(config, file)  # JSON is YAML
            file.flush()
            command = [sys.executable, "-m", "llmserve", "serve", "--config", file.name]
            server = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, env=envs.child_environment(**environment)
            )
            try:
                key = (flags.get("api_key") or [None])[0]
                client = Client(f"http://127.0.0.1:{port}", key)
                runs.append(first_token(client, server, options.startup_timeout))
            finally:
                server.terminate()
                server.wait()
        print(f"{number:6} {runs[-1]['ready']:12.2f} {runs[-1]['first_token']:16.2f}")
    mean = {phase: sum(run[phase] for run in runs) / len(runs) for phase in runs[0]}
    print(f"{'mean':>6} {mean['ready']:12.2f} {mean['first_token']:16.2f}")
    if options.output_json:
        Path(options.output_json).write_text(json.dumps({"mean": mean, "runs": runs}, indent=2))
    return 0
