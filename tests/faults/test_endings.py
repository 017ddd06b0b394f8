# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How a server begins and ends: T05 (killed), T27 (drained), T53 and T54 (starting), SIGUSR1."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.helpers.clock import TooSlow, calibrate
from tests.helpers.faults import FLAGS, Bench, run_stream
from tests.helpers.server import Server, is_alive, llmserve, processes_of


def gone(pids: list[int], seconds: float) -> None:
    """TooSlow unless all of them end within `seconds`."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise TooSlow(f"left behind: {alive}")
        time.sleep(0.02)


def port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


@pytest.mark.parametrize(
    "when", ["serving", "stopped", pytest.param("loading", marks=pytest.mark.faults)]
)
def test_t05_killed_supervisor(bench_model: Path, when: str) -> None:
    """`stopped` stands for a child that is deep in a native call: no thread of it runs."""
    server = Server(str(bench_model), *FLAGS)
    scale = calibrate()
    if when == "loading":
        while len(server.pids) < 3:
            server.pids = processes_of(server.process.pid)
            time.sleep(0.01)
    else:
        server.wait_ready()
    if when == "stopped":
        os.kill(server.pid_of("llmserve.engine.process"), signal.SIGSTOP)
    port = int(server.url.rpartition(":")[2]) if server.url else 0
    with ThreadPoolExecutor(1) as pool:
        if when == "serving":
            ended = pool.submit(run_stream, server.http, 0, "go on", 2000)
            while not server.metrics()["vllm:num_requests_running"]:
                time.sleep(0.01)
        server.process.kill()
        server.wait()
        gone(server.pids, 3 * scale)
        if when == "serving":
            assert ended.result().cut
    assert port_is_free(port)
    server.http.close()
    if when != "loading":  # by the API server, which was left last; it may not have come that far
        assert not list(server.runtime.iterdir())
    with Server(str(bench_model), *FLAGS, env={"XDG_RUNTIME_DIR": str(server.runtime)}) as again:
        assert again.post("/v1/completions", prompt="x", max_tokens=1)
        assert len(list(server.runtime.glob("llmserve-*"))) == 1
    assert not list(server.runtime.iterdir())
    server.runtime.rmdir()


def test_t27_drain(bench_model: Path) -> None:
    """Short answers complete; long ones get one error event; new ones are turned away."""
    server = Server(str(bench_model), *FLAGS, "--shutdown-timeout", "1.5")
    scale = calibrate()
    with server, ThreadPoolExecutor(8) as pool:
        short = [pool.submit(run_stream, server.http, 0, f"s{n}", 100) for n in range(4)]
        long = [pool.submit(run_stream, server.http, 0, f"l{n}", 2000) for n in range(4)]
        while server.metrics()["vllm:num_requests_running"] < 4:
            time.sleep(0.01)
        with httpx.Client(base_url=server.url) as kept:
            kept.get("/health/ready").raise_for_status()
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            while (probe := kept.get("/health/ready")).status_code == 200:
                assert time.monotonic() - began < 2 * scale
                time.sleep(0.01)
            refused = kept.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        for answer in (probe, refused):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "draining"
            assert answer.headers["connection"] == "close"
        assert server.wait() == 0
        took = time.monotonic() - began
        assert [stream.result().endings for stream in short] == [["done"]] * 4
        for stream in long:
            ended = stream.result()
            assert not ended.cut
            if ended.endings == ["done"]:
                continue  # a fast machine
            assert ended.endings == ["error"]
            assert json.loads(ended.error)["error"]["code"] == "draining"
        server.check_gone()
    if took > (1.5 + 2) * scale:
        raise TooSlow(f"the drain of 1.5 s took {took:.1f} s")


def test_t54_traffic_while_it_loads(bench_model: Path, tmp_path: Path) -> None:
    """From the moment that its socket is there; the first 200 comes once the engine is ready."""
    path = str(tmp_path / "api.sock")
    server = Server(str(bench_model), *FLAGS, "--uds", path)
    while not listens(path):
        assert server.process.poll() is None, server.text
        time.sleep(0.01)
    seen: list[tuple[int, str]] = []
    transport = httpx.HTTPTransport(uds=path)
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as early:
        while not seen or seen[-1][0] != 200:
            assert server.process.poll() is None, server.text
            answer = early.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
            if code:
                assert int(answer.headers["retry-after"]) > 0
                assert early.get("/health/live").status_code == 200
                is_warm = "engine ready after" in server.text
                for probe in ("/health", "/health/ready"):
                    ready = early.get(probe)
                    assert ready.status_code == 503 or is_warm or "engine ready" in server.text
                    if ready.status_code == 503:
                        assert ready.json()["error"]["code"] == "starting"
            seen.append((answer.status_code, code))
            time.sleep(0.02)
    assert set(seen[:-1]) == {(503, "starting")}
    assert "engine ready after" in server.text
    with server:
        pass


def test_t53_what_a_start_cannot_have_is_one_line(bench_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
        taken = llmserve("serve", str(bench_model), *FLAGS, "--port", port)
    assert taken.returncode == 2 and len(taken.stdout.splitlines()) == 1
    missing = str(tmp_path / "none")
    env = {"XDG_RUNTIME_DIR": missing, "TMPDIR": missing}
    unwritable = llmserve("serve", str(bench_model), *FLAGS, "--port", "0", env=env)
    assert unwritable.returncode == 2, unwritable.stdout
    (line,) = unwritable.stdout.splitlines()
    assert missing in line and line.startswith("llmserve: error: ")
    for kib in (100_000, 150_000, 300_000, 1_200_000):
        command = [sys.executable, "-m", "llmserve", "serve", str(bench_model), "--port", "0"]
        cramped = subprocess.run(
            ["sh", "-c", f'ulimit -v {kib}; exec "$@"', "sh", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
        )  # fmt: skip
        says = f"llmserve: error: ulimit -v is {kib}, and an engine needs 1310720 at least\n"
        assert (cramped.returncode, cramped.stdout) == (2, says)


@pytest.mark.parametrize("disk", [True, False])
def test_output_that_cannot_be_written_ends_no_server(
    bench_model: Path, tmp_path: Path, disk: bool
) -> None:
    """A full disk; a reader that left."""
    path = str(tmp_path / "api.sock")
    reader, out = os.pipe()
    os.close(reader)
    if disk:
        os.close(out)
        out = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "llmserve", "serve", str(bench_model), *FLAGS, "--uds", path]
    server = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    said: list[str] = []
    assert server.stderr is not None
    with server.stderr as lines, httpx.HTTPTransport(uds=path) as transport:
        while "stdout cannot be written" not in (said[-1:] or [""])[0]:
            said.append(lines.readline())
            assert said[-1], "".join(said)
        with httpx.Client(transport=transport, base_url="http://localhost") as http:
            answer = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        server.terminate()
        said += lines.readlines()
    assert server.wait(20) == 0, said
    assert not [line for line in said if "Traceback" in line or "llmserve: error" in line]


@pytest.mark.faults
def test_t53_eight_at_once(bench_model: Path) -> None:
    servers = [Server(str(bench_model), *FLAGS) for _ in range(8)]
    for server in servers:
        server.wait_ready(timeout=120)
    assert len({server.url for server in servers}) == 8
    threads = [threading.Thread(target=server.stop) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in servers:
        with server:
            assert server.process.returncode == 0


def test_sigusr1_writes_the_stacks_of_all_processes(bench: Bench) -> None:
    with bench.load_and_invariants():
        bench.server.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 10
        files = ("cli/serve.py", "engine/process.py", "api/server.py")
        while bench.server.text.count("Current thread") < 3 or not all(
            f'llmserve/{file}"' in bench.server.text for file in files
        ):
            assert time.monotonic() < deadline, bench.server.text[-3000:]
            time.sleep(0.05)


def test_a_stopped_engine_does_not_keep_the_second_sigterm(bench_model: Path) -> None:
    with Server(str(bench_model), *FLAGS) as server:
        os.kill(server.pid_of("llmserve.engine.process"), signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        try:
            assert server.wait(timeout=10) == 0
        except subprocess.TimeoutExpired:
            raise AssertionError(server.text) from None
        assert time.monotonic() - began < 8


def ended_while_loading(model: Path, numbers: tuple[int, ...]) -> int:
    server = Server(str(model), *FLAGS)
    while len(server.pids) < 3:
        server.pids = processes_of(server.process.pid)
        time.sleep(0.01)
    time.sleep(0.3)
    for number in numbers:
        server.process.send_signal(number)
        time.sleep(0.05)
    code = server.wait()
    server.check_gone()
    server.runtime.rmdir()
    return code


def _heed_sigint() -> None:
    """In a child: who starts tests in the background has it ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_exit_codes_are_as_the_readme_says(bench_model: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.partition("| exit code |")[2].partition("\n\n")[0]
    rows = [re.findall(r"\d+", row) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M)]
    assert [int(code) for row in rows for code in row] == [0, 1, 2, 130, 143, 141]
    assert ended_while_loading(bench_model, (signal.SIGTERM,)) == 0
    assert ended_while_loading(bench_model, (signal.SIGINT, signal.SIGINT)) == 0
    late = llmserve("serve", str(bench_model), "--port", "0", "--engine-start-timeout", "0.1")
    assert late.returncode == 1 and "0.1 s" in late.stdout.splitlines()[-1]
    for wrong in (["--no-such-flag"], ["--kv-cache-memory-bytes", "1"], ["--host", "203.0.113.1"]):
        asked = llmserve("serve", str(bench_model), *wrong)
        assert asked.returncode == 2
        assert asked.stdout.splitlines()[-1].startswith("llmserve: error: "), wrong
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, "-m", "llmserve", "complete", "--url", url, "--quick", "x"]
        asking = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=_heed_sigint)
        silent.settimeout(20)
        with silent.accept()[0] as connection:
            assert connection.recv(1)  # it waits for the answer: nothing on its way eats the signal
            asking.send_signal(signal.SIGINT)
            assert asking.wait(10) == 130
    helping = subprocess.Popen(
        [sys.executable, "-m", "llmserve", "serve", "--help=all"], stdout=subprocess.PIPE
    )
    assert helping.stdout is not None
    helping.stdout.close()
    assert helping.wait(20) == 141
