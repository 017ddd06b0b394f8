# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T03 and T04: the engine is killed, or stops, under load; and who kills too often."""

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.clock import TooSlow
from tests.helpers.faults import FLAGS, Bench, run_stream
from tests.helpers.invariants import Ended
from tests.helpers.server import llmserve, processes_of

HANG_S = 5.0


class Watch:
    """When ready was first refused, and with which code; when it was given again."""

    def __init__(self, bench: Bench) -> None:
        self.codes: list[str] = []
        self.lost_at = self.back_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bench,))
        self._thread.start()

    def _run(self, bench: Bench) -> None:
        with bench.client(keys=False) as http:
            while not self._stop.wait(0.02):
                assert http.get("/health/live").status_code == 200
                answer = http.get("/health/ready")
                if answer.status_code == 503:
                    self.lost_at = self.lost_at or time.monotonic()
                    code = answer.json()["error"]["code"]
                    self.codes += [code] if code not in self.codes[-1:] else []
                    assert int(answer.headers["retry-after"]) > 0
                elif self.lost_at:
                    self.back_at = self.back_at or time.monotonic()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def watched(bench: Bench) -> Iterator[Watch]:
    watch = Watch(bench)
    try:
        yield watch
    finally:
        watch.stop()


def wait_for(done: Callable[[], object], seconds: float, what: str) -> float:
    """Seconds until `done()`; TooSlow after `seconds`."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            raise TooSlow(f"{what} took over {seconds:.1f} s")
        time.sleep(0.02)
    return time.monotonic() - began


def in_time(seconds: float, limit: float, what: str) -> None:
    if seconds > limit:
        raise TooSlow(f"{what} took {seconds:.1f} s, over {limit:.1f}")


@pytest.fixture
def own(bench_model: Path) -> Iterator[Bench]:
    """A server whose engine the row may have restarted, three times at most."""
    with Bench(bench_model, "--engine-hang-timeout", str(HANG_S)) as bench:
        yield bench


def test_t03_killed_engine(own: Bench) -> None:
    """8 streams, 8 whole answers and 8 in the queue of an engine that is killed."""

    def whole(index: int) -> tuple[httpx.Response, float]:
        body = {"prompt": f"whole {index}", "max_tokens": 1900, "ignore_eos": True}
        return own.http.post("/v1/completions", json=body), time.monotonic()

    def queued(index: int) -> list[int]:
        ids: list[int] = own.complete(f"queued {index}", 8)["token_ids"]
        return ids

    alone = [queued(index) for index in range(8)]
    # Without the background load, which would come and go in the batch that the row fills.
    with (
        own.load_and_invariants(restarts=1, load=False),
        ThreadPoolExecutor(24) as pool,
        watched(own) as watch,
    ):
        streams: list[Future[Ended]] = [
            pool.submit(run_stream, own.http, 0, own.solos[0].prompt + f" {n}", 1900)
            for n in range(8)
        ]
        answers = [pool.submit(whole, index) for index in range(8)]
        wait_for(lambda: own.server.metrics()["vllm:num_requests_running"] == 16, 10, "filling")
        time.sleep(0.3)  # so that all of them have begun
        waiting = [pool.submit(queued, index) for index in range(8)]
        wait_for(lambda: own.server.metrics()["vllm:num_requests_waiting"] >= 8, 10, "queueing")
        os.kill(own.engine_pid(), signal.SIGKILL)
        killed = time.monotonic()
        ended = [stream.result(60) for stream in streams]
        told = time.monotonic() - killed
        answered = [answer.result(60) for answer in answers]
        done = [future.result(60) for future in waiting]
        wait_for(lambda: watch.back_at, 60, "coming back")
    assert done == alone
    # a busy machine may have come to an end of some before it looked
    ended = [one for one in ended if one.endings != ["done"] or one.times[-1] > killed]
    refused = [answer for answer, at in answered if answer.status_code != 200 or at > killed]
    assert ended and refused
    for stream in ended:
        assert (stream.status, stream.endings, stream.cut) == (200, ["error"], False)
        assert json.loads(stream.error)["error"]["code"] == "engine_restarted"
    for answer in refused:
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "engine_restarted"
    assert watch.codes == ["engine_dead"]
    in_time(told, 2 * own.scale, "telling the streams")
    in_time(watch.lost_at - killed, 2 * own.scale, "being unready")
    in_time(watch.back_at - killed, 15 * own.scale, "the restart")


@pytest.mark.parametrize(
    "busy", [True, pytest.param(False, marks=pytest.mark.faults)], ids=["busy", "idle"]
)
def test_t04_stopped_engine(own: Bench, busy: bool) -> None:
    with own.load_and_invariants(restarts=1, load=busy), watched(own) as watch:
        os.kill(own.engine_pid(), signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(lambda: watch.back_at, 60, "coming back")
    assert watch.codes[0] == "engine_hung"
    in_time(watch.lost_at - stopped, (HANG_S + 2) * own.scale, "being unready")
    in_time(watch.back_at - stopped, 20 * own.scale, "the restart")
    assert watch.lost_at - stopped > HANG_S - 1.2  # an idle engine's sign may be a second old
    (line,) = (line for line in own.server.output if "restarting" in line)
    assert "the engine has made no step for" in line
    stacks = own.server.text[own.server.text.index(line) :]
    assert stacks.count("Current thread") == 1  # of the API server: the engine cannot


def test_t04_controls(own: Bench) -> None:
    """Neither a pause nor a prompt of full length is a hang: nothing restarts, nothing differs."""
    with own.load_and_invariants():
        pid = own.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)
        own.complete([7 + n % 300 for n in range(2040)], 4)


@pytest.mark.faults
def test_t04_all_are_stopped(own: Bench) -> None:
    """As when the machine is paused: who comes back first does not end the others for it."""
    pids, solo = processes_of(own.server.process.pid), own.solos[0]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(run_stream, own.http, 0, solo.prompt, 500)
        wait_for(lambda: own.server.metrics()["vllm:num_requests_running"], 10, "running")
        for pid in pids:  # the supervisor first
            os.kill(pid, signal.SIGSTOP)
        time.sleep(HANG_S + 1)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
        assert stream.result(60).endings == ["done"]
    own.check_idle()
    assert processes_of(own.server.process.pid) == pids


@pytest.mark.faults
def test_a_fourth_restart_in_five_minutes_is_not_tried(bench_model: Path) -> None:
    """T18663's other half: it gives up loudly. The cause is the last line."""
    bench = Bench(bench_model, keys=False)
    with bench.server:
        bench.http = bench.client()
        for count in range(1, 4):
            os.kill(bench.engine_pid(), signal.SIGKILL)
            wait_for(lambda count=count: bench.restarts() == count, 20, "counting")  # type: ignore[misc]
            wait_for(lambda: bench.http.get("/health/ready").status_code == 200, 60, "restarting")
            assert bench.http.get("/health/live").status_code == 200
        os.kill(bench.engine_pid(), signal.SIGKILL)
        assert bench.server.wait(20) == 1
        last = bench.server.text.rstrip().rpartition("\n")[2]
        assert last == (
            "llmserve: error: the engine process ended (exit code -9); "
            "it was restarted 3 times in 5 minutes"
        )
        bench.server.check_gone()
    bench.http.close()


def test_never_ready(bench_model: Path) -> None:
    """An engine that takes longer to start than it may, before the server was ever ready."""
    run = llmserve(
        "serve", str(bench_model), *FLAGS, "--port", "0", "--engine-start-timeout", "0.1"
    )
    assert run.returncode == 1, run.stdout
    assert "was not ready after 0.1 s" in run.stdout.rstrip().rpartition("\n")[2]


@pytest.mark.faults
@pytest.mark.parametrize("servers", [1, 2])
def test_t03_killed_at_random_moments(bench_model: Path, servers: int) -> None:
    """Whatever it is doing, and with two API servers, too: each request of a mixture has one
    ending, an answer is the right one, and what fails says that the engine was lost."""
    grammar = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["ab"]}}}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "one", "max_tokens": 300}),
        ("/v1/completions", {"prompt": "two", "max_tokens": 3}),
        ("/v1/completions", {"prompt": [7] * 1500, "max_tokens": 20}),
        ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "max_tokens": 40}),
        ("/v1/completions", {"prompt": "a", "response_format": grammar, "max_tokens": 20}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "three", "max_tokens": 100, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ]
    plain = {"temperature": 0, "ignore_eos": True}
    lost = (503, "engine_restarted"), (503, "engine_dead")  # which was new when there was none

    def ask(bench: Bench, kind: int) -> tuple[int, str]:
        """A status, and the text with what differs each time taken out."""
        path, fields = kinds[kind]
        body = plain | {"max_tokens": 200} | fields
        with bench.client() as http:
            text = (answer := http.post(path, json=body)).text
        if answer.status_code != 200:
            return answer.status_code, json.loads(text)["error"]["code"]
        if body.get("stream"):
            events = [json.loads(e) for e in re.findall("^data: ({.*})$", text, re.M)]
            if "error" in events[-1]:
                assert "[DONE]" not in text
                return 503, events[-1]["error"]["code"]
            assert text.count("data: [DONE]") == 1 and text.rstrip().endswith("[DONE]")
            choices = [choice for event in events for choice in event["choices"]]
            return 200, "".join(c.get("text") or c["delta"].get("content") or "" for c in choices)
        choices = json.loads(text)["choices"]
        return 200, "|".join(c.get("text") or c["message"]["content"] for c in choices)

    flags = ("--api-server-count", str(servers), "--max-requests-per-key", "0")
    with Bench(bench_model, *flags) as bench:
        golden = [ask(bench, kind) for kind in range(len(kinds))]
        assert {status for status, _ in golden} == {200}
        with bench.load_and_invariants(restarts=3, load=False):
            for count in range(1, 4):  # as often as it may be
                kill = threading.Timer(random.uniform(0.0, 1.0), os.kill, (bench.engine_pid(), 9))
                kill.start()
                with ThreadPoolExecutor(24) as pool:
                    asked = [(n % len(kinds), pool.submit(ask, bench, n % len(kinds)))
                             for n in range(64)]  # fmt: skip
                    for kind, answer in asked:
                        assert answer.result(120) in (golden[kind], *lost), kinds[kind]
                kill.join()
                wait_for(lambda count=count: bench.restarts() == count, 60, "counting")  # type: ignore[misc]
                bench.wait_ready()
