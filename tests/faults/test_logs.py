# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T47 and T55: what the log says of what clients say, and a server that is short of descriptors."""

import contextlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.faults import FLAGS, Bench
from tests.helpers.raw_http import Raw
from tests.helpers.server import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def test_t47_logs(bench_model: Path) -> None:
    """`--log-format json`: each line is an object, and none has what a client sent."""
    canary = f"canary{secrets.token_hex(8)}"
    evil = f"{canary}\r\nINFO forged\x1b[31m"
    with Bench(bench_model, "--log-format", "json", "--enable-log-requests") as bench:
        raw = Raw(bench.server.url, bench.keys[0])
        http = bench.http
        bodies: list[tuple[str, dict[str, object]]] = [
            (COMPLETIONS, {"prompt": evil, "max_tokens": 5}),
            (COMPLETIONS, {"prompt": evil, "max_tokens": -1}),
            (COMPLETIONS, {"prompt": evil, "model": evil}),
            (COMPLETIONS, {"prompt": "a", "stop": [evil], "user": evil, "cache_salt": evil}),
            (COMPLETIONS, {"prompt": "a", "bad_words": [evil], "request_id": evil}),
            (COMPLETIONS, {"prompt": "a", evil: evil}),
            (CHAT, {"messages": [{"role": "user", "content": evil, "name": evil}]}),
            (CHAT, {"messages": [{"role": evil, "content": evil}]}),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": evil}]}]}),
            (CHAT, {"messages": [], "tools": [{"function": {"name": evil}}]}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}],
                    "response_format": {"json_schema": {"title": evil}}}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}],
                    "chat_template_kwargs": {"x": evil}}),
            ("/tokenize", {"prompt": evil}),
        ]  # fmt: skip
        for path, body in bodies:
            for stream in (False, True):
                http.post(path, json=body | {"stream": stream, "max_tokens": 3})
        for value in (f"Bearer {canary}", canary):
            raw_head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {value}\r\n"
            assert raw.ask([raw_head.encode() + b"\r\n"]) == 401
        for name in ("X-Request-Id", "User-Agent", "X-Forwarded-For", "Origin"):
            raw.ask([raw.head("GET", "/v1/models", f"{name}: {canary}\x1b[31m") + b"\r\n"])
        sock = raw.connect(raw.request(COMPLETIONS, {"prompt": canary, "max_tokens": 500}))
        time.sleep(0.1)
        sock.close()
        with bench.client() as streaming, contextlib.suppress(Exception):
            body = {"prompt": canary, "max_tokens": 1500, "ignore_eos": True, "stream": True}
            with streaming.stream("POST", COMPLETIONS, json=body) as answer:
                next(answer.iter_lines())
                os.kill(bench.engine_pid(), signal.SIGKILL)  # in the middle of it
                answer.read()
        deadline = time.monotonic() + 20
        while bench.server.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if bench.http.get("/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        lines = list(bench.server.output)
    assert not [line for line in lines if canary in line or "forged" in line]
    assert not [line for line in lines if any(key in line for key in bench.keys)]
    started = next(i for i, line in enumerate(lines) if "startup complete" in line)
    told = [line for line in lines[started + 1 :] if line and not line.startswith("llmserve: ")]
    assert len(told) > 20
    for line in told:
        assert {"time", "level", "process", "pid", "message"} <= json.loads(line).keys(), line


@pytest.fixture
def starved(bench_model: Path) -> Iterator[Server]:
    prefix = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    with Server(str(bench_model), *FLAGS, prefix=prefix) as server:
        yield server


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_t55_more_connections_than_descriptors(starved: Server) -> None:
    raw = Raw(starved.url, "")
    answers: list[bytes] = []
    with contextlib.ExitStack() as held:
        socks: list[socket.socket] = []
        for _ in range(1000):
            with contextlib.suppress(OSError):
                sock = raw.connect()
                held.callback(sock.close)
                socks.append(sock)
        time.sleep(0.3)
        before = {pid: cpu_seconds(pid) for pid in starved.pids}
        time.sleep(1.0)
        spun = {pid: cpu_seconds(pid) - before[pid] for pid in starved.pids}
        assert max(spun.values()) < 0.3, spun
        for sock in socks:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                answers.append(sock.recv(4096))
        assert len([a for a in answers if a.startswith(b"HTTP/1.1 503")]) > 200
        # those that are in still work
        first = socks[0]
        first.setblocking(True)
        first.sendall(raw.request(COMPLETIONS, {"prompt": "hi", "max_tokens": 3}))
        assert first.recv(4096).startswith(b"HTTP/1.1 200")
    deadline = time.monotonic() + 5
    while True:
        with contextlib.suppress(Exception):
            body = {"prompt": "hi", "max_tokens": 3}
            if starved.http.post(COMPLETIONS, json=body).status_code == 200:
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starved.check_idle()
