# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Two API servers on one engine: they answer as one; one is killed, one is stuck, both drain."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.clock import TooSlow
from tests.helpers.faults import FLAGS, Bench, run_stream, stopped
from tests.helpers.invariants import Ended, check_streams
from tests.helpers.server import Server, processes_of

ROLE = "llmserve.api.server"
HANG_S = 3.0
PER_KEY = 8
LONG = 1500  # tokens
# A signal that no program of ours knows: it stops the thread of the event loop, and no other.
STUCK = "import signal, time\nsignal.signal(signal.SIGUSR2, lambda *_: time.sleep(600))\n"


def api_pids(supervisor: int) -> list[int]:
    found = []
    for pid in processes_of(supervisor):
        with contextlib.suppress(OSError):  # it ended while we looked
            if ROLE in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@pytest.fixture(scope="module")
def two(bench_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(STUCK)
    source = str(Path(__file__).parents[2] / "src")
    flags = (
        "--api-server-count", "2", "--api-hang-timeout", str(HANG_S),
        "--max-requests-per-key", str(PER_KEY),
    )  # fmt: skip
    with Bench(bench_model, *flags, env={"PYTHONPATH": f"{hook}:{source}"}) as bench:
        yield bench


class Streams:
    """As many long streams of key A as a key may have, on both servers, all of which have begun;
    and one after another of key B."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._stop = threading.Event()
        self.short: list[Ended] = []
        self._long = [Ended(0) for _ in range(PER_KEY)]
        bench.check_idle()
        # a place is free a moment after its stream's last byte
        wait_for(lambda: not bench.http.get("/load").json()["server_load"], "nobody")
        self._threads = [
            threading.Thread(target=self._one, args=(number,)) for number in range(PER_KEY)
        ]
        self._threads.append(threading.Thread(target=self._one_by_one))
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Streams":
        try:
            wait_for(lambda: all(one.times or one.error for one in self._long), "first tokens")
        except BaseException:
            self._join()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def _join(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _one(self, number: int) -> None:
        prompt = f"{self._bench.solos[0].prompt} {number}"
        with self._bench.client() as http:
            run_stream(http, 0, prompt, LONG, into=self._long[number])

    def _one_by_one(self) -> None:
        with self._bench.client(key=1) as http:
            while not self._stop.is_set():
                self.short.append(run_stream(http, 1, self._bench.solos[1].prompt))
                if self.short[-1].endings != ["done"]:
                    self._stop.wait(0.1)

    def end(self) -> tuple[list[Ended], list[Ended]]:
        """Those of the long ones that came to their end, and those that were cut."""
        for thread in self._threads[:PER_KEY]:
            thread.join()
        self._join()
        cut = [one for one in self._long if one.cut]
        whole = [one for one in self._long if not one.cut]
        for one in whole:
            assert (one.endings, len(one.token_ids)) == (["done"], LONG), one.error
        assert not any(one.endings for one in cut)
        return whole, cut


def wait_for(done: Callable[[], object], what: str) -> None:
    """Until `done()`, for a minute at most."""
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_both_answer_as_one(two: Bench) -> None:
    """--api-server-count, --max-requests-per-key: connections are shared out, a key's places are
    counted over both servers, and either's /metrics has the sums."""
    pids = api_pids(two.server.process.pid)
    assert len(pids) == 2
    with two.load_and_invariants(load=False):
        before = two.server.metrics()
        lines = len(two.server.output)
        with Streams(two) as streams:
            with stopped(two.engine_pid()):  # so that none of them ends while we look
                asked = [two.http.post("/v1/completions", json={"prompt": "x"}) for _ in range(4)]
                assert [answer.status_code for answer in asked] == [429] * 4
                running = [two.server.metrics()["vllm:num_requests_running"] for _ in range(4)]
                assert min(running) >= PER_KEY  # whichever server says so
                assert two.http.get("/load").json()["server_load"] >= PER_KEY
            whole, _ = streams.end()
        assert len(whole) == PER_KEY
        after = [two.server.metrics() for _ in range(40)]  # of both, but for one time in 2**39
        log = two.server.output[lines:]
    for name, number in (
        ("vllm:request_success_total", PER_KEY + len(streams.short)),
        ("vllm:generation_tokens_total", LONG * PER_KEY + 200 * len(streams.short)),
        ("vllm:e2e_request_latency_seconds_count", PER_KEY + len(streams.short)),
        ("llmserve:refused_total{key_limit}", 4),
    ):
        assert {values[name] - before[name] for values in after} == {number}, name
    of = [[line for line in log if f"pid={pid})" in line and "completions" in line] for pid in pids]
    assert all(of)
    scrapes = [
        [line for line in log if f"pid={pid})" in line and "/metrics" in line] for pid in pids
    ]
    assert all(scrapes)


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGUSR2, marks=pytest.mark.faults)],
    ids=["killed", "stuck"],
)
def test_one_of_two_is_lost(two: Bench, number: signal.Signals) -> None:
    """Its streams are cut, those of the other and the engine do not notice; another takes its
    place, and what its clients had is free again."""
    lines = len(two.server.output)
    before = two.server.metrics()["llmserve:api_server_restarts_total"]
    with two.load_and_invariants(load=False, failed=PER_KEY):
        with Streams(two) as streams:
            first = api_pids(two.server.process.pid)
            os.kill(first[1], number)
            began = time.monotonic()
            while len(pids := api_pids(two.server.process.pid)) < 2 or pids == first:
                assert time.monotonic() - began < 60, two.server.text
                time.sleep(0.05)
            replaced = time.monotonic() - began
            whole, cut = streams.end()
        assert whole and cut  # about half and half
        assert first[0] in pids
        with Streams(two) as again:
            assert len(again.end()[0]) == PER_KEY
        wrong = check_streams(two.solos, streams.short[:-1] + again.short, True)
        lost = [one for one in streams.short if one.endings != ["done"]]
        assert not wrong or len(lost) <= 1, wrong
    assert two.server.metrics()["llmserve:api_server_restarts_total"] == before + 1
    log = two.server.output[lines:]
    (line,) = (line for line in log if "restarting" in line)
    if number == signal.SIGKILL:
        assert "the API server process ended (exit code -9)" in line
    else:
        assert "the API server has been stuck for" in line
        stacks = "\n".join(log[log.index(line) :])
        assert stacks.count("Current thread") == 1 and "sitecustomize.py" in stacks
    limit = (2 if number == signal.SIGKILL else HANG_S + 2) * two.scale
    if replaced > limit:
        raise TooSlow(f"the restart took {replaced:.1f} s, over {limit:.1f}")


def test_one_that_cannot_start_again_is_done_without(bench_model: Path, tmp_path: Path) -> None:
    """The model's folder is gone: the other one serves, until the engine, too, is lost."""
    folder = tmp_path / "model"
    shutil.copytree(bench_model, folder)
    with Server(str(folder), *FLAGS, "--api-server-count", "2") as server:
        first, lines = api_pids(server.process.pid), len(server.output)
        folder.rename(tmp_path / "gone")
        os.kill(first[0], signal.SIGKILL)
        wait_for(lambda: "the other API servers go on" in server.text, "giving it up")
        server.pids.remove(first[0])
        assert api_pids(server.process.pid) == first[1:]
        for path in ("/health", "/health/ready", "/health/live"):
            assert server.http.get(path).status_code == 200
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        assert server.post("/v1/chat/completions", **chat)["usage"]["completion_tokens"]
        server.check_idle()
        assert server.metrics()["llmserve:api_server_restarts_total"] == 4
        said = [line for line in server.output[lines:] if "has no tokenizer.json" in line]
        assert len(said) == 3 and "it was restarted 3 times in 5 minutes" in said[-1]
        os.kill(server.pid_of("llmserve.engine.process"), signal.SIGKILL)
        assert server.wait(20) == 2
        assert server.output[-1] == f"llmserve: error: no such file or folder: {folder}"


@pytest.mark.faults
def test_both_drain(bench_model: Path) -> None:
    with Server(str(bench_model), *FLAGS, "--api-server-count", "2") as server:
        pids = api_pids(server.process.pid)
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(run_stream, server.http, 0, f"p {n}", 300) for n in range(4)]
            deadline = time.monotonic() + 10
            while server.metrics()["vllm:num_requests_running"] < 4:
                assert time.monotonic() < deadline
            server.process.send_signal(signal.SIGTERM)
            ended = [stream.result(30) for stream in streams]
        assert [(one.endings, len(one.token_ids)) for one in ended] == [(["done"], 300)] * 4
        assert server.wait() == 0
        for pid in pids:
            told = [line for line in server.output if f"pid={pid})" in line]
            assert any("completions" in line for line in told)
            assert any("Finished server process" in line for line in told)
