# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What README.md says is run as it stands, but for the server's port and the program's place."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmserve.cli.args import parse_flags
from llmserve.config import demo
from llmserve.config.engine import ENGINE_GROUPS
from llmserve.config.server import ServerConfig
from tests.helpers.server import Server, llmserve

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
RUN = [text for kind, text in BLOCKS if kind in ("sh", "python")]
# Not run here, and what covers it instead.
SUBSTITUTES = {
    "git clone": "test_make_serve_runs_the_program (a clone on a bare machine is .ci/run)",
    "make serve MODEL=": "test_make_serve_runs_the_program; hub ids: tests/config/test_source.py",
    "docker build": "test_docker_files_fit_the_tree",
    "make test": "this is it",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model, with the configuration file of the README."""
    (text,) = (text for kind, text in BLOCKS if kind == "yaml")
    config = tmp_path_factory.mktemp("readme") / "file.yaml"
    config.write_text(text)
    with Server("--config", str(config), "--cpu-threads", "1") as server:
        yield server


def script(text: str, server: Server | None = None) -> subprocess.CompletedProcess[str]:
    """Runs shell lines; `.venv/bin/llmserve` is this interpreter's program."""
    if server is not None:
        address = server.url.removeprefix("http://")
        text = text.replace("127.0.0.1:8000", address)
        port = address.rpartition(":")[2]
        for command, flag in (("chat", "--url"), ("complete", "--url"), ("bench serve", "--port")):
            value = port if flag == "--port" else f"{server.url}/v1"
            text = text.replace(f"llmserve {command} ", f"llmserve {command} {flag} {value} ")
    text = text.replace(".venv/bin/llmserve", f"{shlex.quote(sys.executable)} -m llmserve")
    return subprocess.run(
        ["bash", "-euc", text],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        timeout=120,
    )


def block(beginning: str) -> str:
    (text,) = (text for text in RUN if beginning in text)
    return text


def test_every_block_is_accounted_for() -> None:
    seen = ["curl ", "OpenAI(", "llmserve chat", "LLM()", "serve --help=all"]
    assert [any(mark in text for mark in seen) for text in RUN] == [True] * len(seen)
    others = [text for kind, text in BLOCKS if not kind]
    assert [any(text.startswith(s) for s in SUBSTITUTES) for text in others] == [True] * len(others)
    assert len(SUBSTITUTES) == len(others)


def test_curl(server: Server) -> None:
    run = script(block("curl "), server)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["model"] == "demo"  # of file.yaml
    assert answer["choices"][0]["message"]["content"].strip()
    assert 1 < answer["usage"]["completion_tokens"] <= 32
    assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 4000
    server.check_idle()


def test_openai_client(server: Server) -> None:
    code = block("OpenAI(").replace("http://127.0.0.1:8000", server.url)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    server.check_idle()


def test_terminal(server: Server) -> None:
    run = script(block("llmserve chat"), server)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert len(run.stdout.splitlines()) >= 2
    chat = ["chat", "--url", server.url, "--max-tokens", "16"]
    talk = llmserve(*chat, stdin="Say hello.\n")
    assert talk.returncode == 0
    first, _, said = talk.stdout.partition("\n")
    assert first == f"demo at {server.url}. Ctrl-D ends."
    assert len(said.replace(">", "").split()) >= 1
    server.check_idle()


def test_commands(server: Server) -> None:
    text = block("serve --help=all")
    runs = [script(line, server) for line in text.splitlines()]
    assert [run.returncode for run in runs] == [0] * 4, [run.stderr[-500:] for run in runs]
    help_, plan, bench, env = (run.stdout for run in runs)
    assert "--scheduling-policy" in help_ and "--max-request-bytes" in help_
    assert demo.NAME in plan and re.search(r"requests at once", plan)
    assert re.search(r"Successful requests: +8\b", bench) and "P99 TTFT (ms):" in bench
    assert "torch:" in env and "python:" in env
    server.check_idle()


def test_bench_keys(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    run = llmserve(
        "bench", "serve", "--port", port, "--num-prompts", "4", "--random-input-len", "16",
        "--random-output-len", "4", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "r.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["completed"], record["failed"]) == (4, 0)
    assert (record["total_input_tokens"], record["total_output_tokens"]) == (64, 16)
    for key in ("request_throughput", "output_throughput", "total_token_throughput", "duration"):
        assert record[key] > 0
    assert 0 < record["median_ttft_ms"] <= record["p99_ttft_ms"] and record["mean_tpot_ms"] > 0


def test_offline(tmp_path: Path) -> None:
    path = tmp_path / "offline.py"
    path.write_text(block("LLM()"))
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=90
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.strip()) > 20 and "Traceback" not in run.stderr


def test_make_serve_runs_the_program() -> None:
    (text,) = (text for kind, text in BLOCKS if text.startswith("make serve MODEL="))
    lines = ["make serve", *(line.partition("#")[0] for line in text.splitlines())]
    for line in lines:
        printed = subprocess.run(
            ["make", "-n", "-o", "install", *shlex.split(line)[1:]],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        (command,) = (row for row in printed.splitlines() if "exec" in row)
        words = shlex.split(command)
        assert words[:3] == ["exec", ".venv/bin/llmserve", "serve"]
        flags = parse_flags(words[3:], (*ENGINE_GROUPS, ServerConfig), prog="llmserve serve")
        named = re.search(r"MODEL=(\S+)", line)
        assert flags.get("model") == (named and named[1])
        if "ARGS" in line:
            assert (flags["port"], flags["max_model_len"]) == (9000, 8000)


def test_flags_of_the_table_exist() -> None:
    known = llmserve("serve", "--help=all").stdout
    table = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    named = re.findall(r"`(--[\w-]+)", table)
    assert len(named) > 12
    for flag in named:
        if flag != "--config":
            assert re.search(rf"{flag}\b", known), flag


def test_docker_files_fit_the_tree() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    steps = re.findall(r"^([A-Z]+) (.*(?:\\\n.*)*)", dockerfile, re.M)
    words = [(kind, rest) for kind, rest in steps if kind != "ARG"]
    stages = [rest for kind, rest in words if kind == "FROM"]
    assert len(stages) == 2 and "devel" in stages[0] and "devel" not in stages[1]
    for kind, rest in words:
        if kind == "COPY" and "--from" not in rest:
            ignored = (ROOT / ".dockerignore").read_text().splitlines()
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source
    last = dockerfile[dockerfile.rindex("FROM ") :]
    for word in ("USER 2000:0", "EXPOSE 8000", "VOLUME /cache", "/health/ready", "HF_HOME=/cache"):
        assert word in last
    (entry,) = (json.loads(rest) for kind, rest in words if kind == "ENTRYPOINT")
    assert entry[:2] == ["llmserve", "serve"]
    flags = parse_flags(entry[2:], (*ENGINE_GROUPS, ServerConfig), prog="llmserve serve")
    assert flags == {"host": "0.0.0.0", "port": 8000}
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    service = compose["services"]["llmserve"]
    assert (ROOT / "docker" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).exists()
    empty = parse_flags([*entry[2:], "--model", ""], (*ENGINE_GROUPS, ServerConfig), prog="x")
    assert service["command"] == ["--model", "${MODEL:-}"] and empty["model"] == ""


def test_healthcheck_command(server: Server) -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    check = re.search(r"HEALTHCHECK.*\\\n *CMD (\[.*\])", dockerfile)
    assert check is not None
    program, *arguments = json.loads(check[1])
    assert program == "python3"
    for url, code in ((server.url, 0), ("http://127.0.0.1:1", 1)):
        command = [word.replace("http://127.0.0.1:8000", url) for word in arguments]
        run = subprocess.run([sys.executable, *command], capture_output=True, timeout=20)
        assert run.returncode == code
