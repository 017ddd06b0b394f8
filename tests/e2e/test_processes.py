# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How the processes of a server come up, and how they end, whoever ends them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.helpers.server import Server, llmserve, processes_of

FLAGS = [
    "--max-model-len", "32768", "--kv-cache-memory-bytes", "64MiB", "--dtype", "float32",
    "--cpu-threads", "1",
]  # fmt: skip
ENDLESS = 32000  # tokens; minutes


@contextlib.contextmanager
def streaming(server: Server, max_tokens: int) -> Iterator[Iterator[str]]:
    """The data of a stream's events, after the first three."""
    body = {
        "prompt": "Go on.", "max_tokens": max_tokens, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        events = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        for _ in range(3):
            next(events)
        yield events


def rest(events: Iterator[str]) -> tuple[list[str], bool]:
    """What still comes, and whether the connection was cut before its end."""
    seen: list[str] = []
    try:
        for event in events:
            seen.append(event)
    except httpx.RemoteProtocolError:
        return seen, True
    return seen, False


def last_line(server: Server) -> str:
    return server.text.rstrip().rpartition("\n")[2]


def test_a_client_that_leaves_frees_its_request(qwen3: Path) -> None:
    with Server(str(qwen3), *FLAGS) as server:
        with streaming(server, ENDLESS):
            assert server.metrics()["vllm:num_requests_running"] == 1
            assert server.metrics()["llmserve:kv_blocks{used}"] > 0
        server.check_idle()
        assert server.metrics()["vllm:request_success_total{abort}"] == 1
        assert server.metrics()["vllm:generation_tokens_total"] < ENDLESS / 10
        maps = {
            module: Path(f"/proc/{server.pid_of(module)}/maps").read_text()
            for module in ("llmserve.api.server", "llmserve.engine.process")
        }
        assert "libtorch" in maps["llmserve.engine.process"]
        for library in ("libtorch", "xgrammar", "libtriton"):
            assert library not in maps["llmserve.api.server"]


def test_the_curl_line_works_as_printed(qwen3: Path) -> None:
    with Server(str(qwen3), *FLAGS) as server:
        (line,) = (line for line in server.output if line.startswith("  curl "))
        printed = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(printed.stdout)["usage"]["completion_tokens"] > 0
        assert server.stop(signal.SIGINT) == 0  # Ctrl-C
        assert "Traceback" not in server.text and "llmserve: error" not in server.text


def test_lost_api_server(qwen3: Path) -> None:
    """One that is killed, and one that stops for --api-hang-timeout: another takes its place, and
    what its clients had running ends."""
    with Server(str(qwen3), *FLAGS, "--api-hang-timeout", "2") as server:
        for count, number in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
            engine = server.pid_of("llmserve.engine.process")
            lost = server.pid_of("llmserve.api.server")
            with streaming(server, ENDLESS) as events:
                os.kill(lost, number)
                assert rest(events)[1]
            deadline = time.monotonic() + 30
            while server.http.get("/health/ready").status_code != 200:
                assert time.monotonic() < deadline, server.text
                time.sleep(0.05)
            server.pids = processes_of(server.process.pid)
            assert server.pid_of("llmserve.engine.process") == engine
            assert server.pid_of("llmserve.api.server") != lost
            server.check_idle()
            assert server.metrics()["llmserve:engine_restarts_total"] == 0
            assert server.metrics()["llmserve:api_server_restarts_total"] == count
            assert server.metrics()["llmserve:dropped_events_total"] == 0


def test_sigterm_lets_a_stream_finish(qwen3: Path) -> None:
    with Server(str(qwen3), *FLAGS) as server:
        with streaming(server, 1500) as events:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.HTTPStatusError, match="503"):
                httpx.get(f"{server.url}/health/ready").raise_for_status()
            seen, cut = rest(events)
        assert not cut and seen[-1] == "[DONE]"
        assert json.loads(seen[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


def test_a_second_sigterm_ends_it_now(qwen3: Path) -> None:
    with Server(str(qwen3), *FLAGS) as server, streaming(server, ENDLESS) as events:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0
        assert "[DONE]" not in rest(events)[0]


def test_a_drain_has_an_end(qwen3: Path) -> None:
    """--shutdown-timeout."""
    with Server(str(qwen3), *FLAGS, "--shutdown-timeout", "0.5") as server:
        with streaming(server, ENDLESS) as events:
            server.process.send_signal(signal.SIGTERM)
            seen, _ = rest(events)
        assert json.loads(seen[-1])["error"]["code"] == "draining"
        assert server.wait(timeout=10) == 0


def test_unix_socket_answers_503_until_the_model_is_there(qwen3: Path, tmp_path: Path) -> None:
    """--uds."""
    path = str(tmp_path / "api.sock")
    server = Server(str(qwen3), *FLAGS, "--uds", path)
    while not Path(path).exists():
        assert server.process.poll() is None, server.text
        time.sleep(0.02)
    time.sleep(0.1)  # from bind to listen
    transport = httpx.HTTPTransport(uds=path)
    with httpx.Client(transport=transport, base_url="http://localhost") as early:
        refused = early.post("/v1/completions", json={"prompt": "hi"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "starting"
        assert int(refused.headers["retry-after"]) > 0
        assert early.get("/health/live").status_code == 200
    with server:
        (line,) = (line for line in server.output if line.startswith("  curl "))
        printed = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert json.loads(printed.stdout)["usage"]["completion_tokens"] > 0
        server.check_idle()
    assert not Path(path).exists()


def test_ctrl_c_while_it_starts(qwen3: Path) -> None:
    server = Server(str(qwen3), *FLAGS)
    while not server.output:
        time.sleep(0.02)
    server.pids = [server.process.pid]
    assert server.stop(signal.SIGINT) == 0
    assert "Traceback" not in server.text
    server.check_gone()


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        run = llmserve("serve", "--port", str(port))
    assert run.returncode == 2
    assert run.stdout == (
        f"llmserve: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    )


def test_keys_names_and_prefix(qwen3: Path) -> None:
    """--api-key --served-model-name --root-path --response-role --enable-log-requests
    --disable-uvicorn-access-log --enable-force-include-usage --max-request-bytes
    --allowed-origins."""
    flags = [
        "--api-key", "one", "two", "--served-model-name", "tiny", "small", "--root-path", "/llm",
        "--response-role", "oracle", "--enable-log-requests", "--disable-uvicorn-access-log",
        "--enable-force-include-usage", "--max-request-bytes", "4096",
        "--allowed-origins", "https://a.example",
    ]  # fmt: skip
    with Server(str(qwen3), *FLAGS, *flags) as server:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="three", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            for key in ("one", "two"):
                names = client.with_options(api_key=key).models.list().data
                assert [card.id for card in names] == ["tiny", "small"]
            client.api_key = "two"
            for model in ("tiny", "small"):
                answer = client.chat.completions.create(model=model, **asked)
                assert answer.model == model
                assert answer.choices[0].message.role == "oracle"
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model=str(qwen3), **asked)
            stream = client.completions.create(model="tiny", prompt="hi", max_tokens=2, stream=True)
            assert [chunk.usage for chunk in stream][-1] is not None
            with pytest.raises(openai.APIStatusError, match="4096 bytes"):
                client.completions.create(model="tiny", prompt="x" * 5000)
        headers = {"Authorization": "Bearer one", "Origin": "https://a.example"}
        listed = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert listed.headers["access-control-allow-origin"] == "https://a.example"
        assert server.url.endswith("/llm")
        direct = server.url.removesuffix("/llm")  # as a proxy that strips the prefix asks
        assert httpx.get(f"{direct}/v1/models", headers=headers).status_code == 200
        (line,) = (line for line in server.output if line.startswith("  curl "))
        printed = subprocess.run(
            line.replace("YOUR_KEY", "one"), shell=True, capture_output=True, text=True, check=True
        )
        assert json.loads(printed.stdout)["model"] == "tiny"
        server.http.headers["Authorization"] = "Bearer one"
        server.check_idle()
        assert "GET /v1/models" not in server.text and "GET /llm" not in server.text
        assert answer.id.removeprefix("chatcmpl-") in server.text
