# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The bench of the fault rows: a real server on a tiny real model, a load that knows its answers,
and the invariants that must hold during a fault and after it.

    with bench.load_and_invariants():
        bench.http.post(...)                    # whatever the row does

Deadlines are those of a machine of our own; `Bench.scale` says how much slower this one is while
the row runs. What fails by its deadline alone raises TooSlow.
"""

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.helpers.clock import TooSlow, calibrate
from tests.helpers.invariants import (
    MAX_RSS_GROWTH,
    Ended,
    Probe,
    Snapshot,
    Solo,
    check_blocks,
    check_canary,
    check_error_body,
    check_leaks,
    check_log,
    check_probe_times,
    check_probes,
    check_restarts,
    check_streams,
    snapshot,
)
from tests.helpers.server import Server, processes_of
from tests.helpers.tiny_models import write_tiny_model

MAX_MODEL_LEN = 2048
NUM_BLOCKS = 256
FLAGS = (
    "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "16",
    "--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "16",
    "--max-num-queued-reqs", "32", "--dtype", "float32", "--cpu-threads", "1",
    "--shutdown-timeout", "5",
)  # fmt: skip
NUM_STREAMS = 4
NUM_TOKENS = 200  # of each background stream
SETTLE_S = 10.0  # after the row, until everything must be as before
PROBES = ("/health/live", "/health/ready")
_PROBE_EVERY_S = 0.05
_API = "llmserve.api.server"
_POOL = min(32, (os.cpu_count() or 1) + 4)  # threads that asyncio starts as they are asked for


def write_bench_model(folder: Path, *, vocab_size: int = 384) -> Path:
    """Two layers in float32. The tokenizer has about 350 tokens: the logits are wider or, with a
    smaller `vocab_size`, narrower."""
    return write_tiny_model(
        folder,
        "llama",
        num_hidden_layers=2,
        max_position_embeddings=MAX_MODEL_LEN,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )


class Load:
    """Greedy streams, again and again until it is stopped, and probes beside them."""

    def __init__(self, bench: "Bench", num_streams: int = NUM_STREAMS) -> None:
        self.streams: list[Ended] = []
        self.probes: list[Probe] = []
        self._bench = bench
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._stream, args=(index,)) for index in range(num_streams)
        ]
        self._threads.append(threading.Thread(target=self._probe))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets the streams come to their ends; joins."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_running(self, timeout: float = 20.0) -> None:
        """Until every stream has ended once, so that all of them are warm."""
        deadline = time.monotonic() + timeout
        while {ended.index for ended in list(self.streams)} != set(range(NUM_STREAMS)):
            assert time.monotonic() < deadline, "the background streams do not run"
            time.sleep(0.01)

    def _stream(self, index: int) -> None:
        with self._bench.client() as http:
            while not self._stop.is_set():
                ended = run_stream(http, index, self._bench.solos[index].prompt)
                self.streams.append(ended)
                if ended.endings != ["done"]:
                    self._stop.wait(0.1)

    def _probe(self) -> None:
        with self._bench.client(keys=False) as http:
            while not self._stop.is_set():
                for path in PROBES:
                    began = time.monotonic()
                    try:
                        status = http.get(path).status_code
                    except httpx.HTTPError:
                        status = 0
                    self.probes.append(Probe(path, status, time.monotonic() - began))
                self._stop.wait(_PROBE_EVERY_S)


def run_stream(
    http: httpx.Client,
    index: int,
    prompt: str,
    max_tokens: int = NUM_TOKENS,
    *,
    into: Ended | None = None,
    **fields: Any,
) -> Ended:
    """One greedy stream to its end, whatever that is; `into` has what came so far."""
    body = {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    ended = Ended(index) if into is None else into
    began = time.monotonic()
    try:
        with http.stream("POST", "/v1/completions", json=body | fields) as answer:
            ended.status = answer.status_code
            if answer.status_code != 200:
                ended.error = answer.read().decode()
                return ended
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    ended.endings.append("done")
                elif line.startswith('data: {"error"'):
                    ended.endings.append("error")
                    ended.error = line[6:]
                elif line.startswith("data: "):
                    ended.times.append(time.monotonic())
                    for choice in json.loads(line[6:])["choices"]:
                        ended.token_ids += choice.get("token_ids") or []
    except httpx.HTTPError as error:
        ended.cut = True
        ended.error = ended.error or repr(error)
    finally:
        ended.seconds = time.monotonic() - began
    return ended


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Bench:
    """A server with two keys. Use as a context manager; leaving it checks that nothing stays.

    `http` speaks with key A and keeps no connection; all errors that it is given are looked at.
    """

    def __init__(
        self, model: Path, *flags: str, env: dict[str, str] | None = None, keys: bool = True
    ) -> None:
        self.canary = f"canary{secrets.token_hex(6)}"
        self.keys = [f"key-{name}-{secrets.token_hex(8)}" for name in "AB"] if keys else []
        with_keys = ("--api-key", *self.keys) if keys else ()
        self.server = Server(str(model), *FLAGS, *with_keys, *flags, env=env)
        self.solos: list[Solo] = []
        self.failures: list[tuple[int, str]] = []
        self.scale = 1.0
        self._clients = contextlib.ExitStack()

    def start(self) -> "Bench":
        """Waits for the server, and learns what its prompts give alone."""
        self.server.wait_ready()
        self.scale = calibrate()
        ready = self.snapshot()
        self._most_threads = ready.threads[_API] + ready.processes[_API] * _POOL
        self.http = self._clients.enter_context(self.client())
        self.server.http.close()
        self.server.http = self._clients.enter_context(self.client())
        for index in range(NUM_STREAMS):
            words = " ".join(f"word{index}{n}" for n in range(3 + 12 * index))
            self.solos.append(self.solo(f"{index} {self.canary} {words}"))
        self._warm_up()
        return self

    def _warm_up(self) -> None:
        load = Load(self)
        load.wait_running()
        prompts = [f"{n} " * 200 for n in range(8)]
        with self.client() as http:
            body = {"prompt": prompts, "max_tokens": 4, "logprobs": 2}
            assert http.post("/v1/completions", json=body).status_code == 200
        load.stop()
        self.check_idle()

    def client(self, *, key: int = 0, keys: bool = True, **options: Any) -> httpx.Client:
        """A client that keeps no connection, with key `key` unless `keys` is false."""
        headers = {"Authorization": f"Bearer {self.keys[key]}"} if keys and self.keys else {}
        return httpx.Client(
            base_url=self.server.url,
            headers=headers,
            timeout=60.0,
            limits=httpx.Limits(max_keepalive_connections=0),
            event_hooks={"response": [self._look]},
            **options,
        )

    def _look(self, answer: httpx.Response) -> None:
        if answer.status_code >= 400 and not answer.request.url.path.startswith("/health"):
            self.failures.append((answer.status_code, answer.read().decode()))

    def solo(self, prompt: str, max_tokens: int = NUM_TOKENS) -> Solo:
        """What `prompt` gives alone."""
        choice = self.complete(prompt, max_tokens, logprobs=2)
        tops = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
        gaps = [top[-1] - top[-2] if len(top) > 1 else 0.0 for top in tops]
        return Solo(prompt, choice["token_ids"], gaps)

    def complete(self, prompt: str | list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """The choice of one greedy completion."""
        body = {
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self.http.post("/v1/completions", json=body | fields)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def engine_pid(self) -> int:
        """Of the engine as it is now."""
        return self.snapshot().engine_pid

    def snapshot_pids(self) -> list[int]:
        """Of all its processes as they are now."""
        return processes_of(self.server.process.pid)

    def snapshot(self) -> Snapshot:
        """Its processes as they are."""
        return snapshot(self.server.process.pid, [self.server.runtime])

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Until /health/ready says so."""
        deadline = time.monotonic() + timeout
        while self.http.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline, "not ready"
            time.sleep(0.05)

    def restarts(self) -> float:
        """Engine restarts counted so far."""
        return self.server.metrics().get("llmserve:engine_restarts_total", 0.0)

    def check_idle(self, timeout: float = SETTLE_S) -> None:
        """I2, within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while wrong := check_blocks(self.server.metrics()):
            assert time.monotonic() < deadline, wrong
            time.sleep(0.05)

    @contextlib.contextmanager
    def load_and_invariants(
        self,
        *,
        restarts: int | None = 0,
        max_rss_growth: int = MAX_RSS_GROWTH,
        load: bool = True,
        foreign: tuple[str, ...] = (),
        failed: int = 0,
    ) -> Iterator[Load | None]:
        """Runs the block under the background load; then I1 to I8 must hold.

        `restarts` is how often the row has the engine restarted (None: once or not at all): its
        streams may then fail, and ready may be 503. `failed` counts failed requests that `http`
        does not see. `foreign` are texts of other clients that no error may show.
        """
        before, counted = self.snapshot(), self.restarts()
        # Which request has a pool grow is chance; a leak of every request passes this all the same
        before.threads[_API] = max(before.threads[_API], self._most_threads)
        self.scale = calibrate()
        num_lines, self.failures = len(self.server.output), []
        running = Load(self) if load else None
        try:
            if running:
                running.wait_running()
            yield running
        finally:
            if running:
                running.stop()
            self.scale = max(self.scale, calibrate())
        if restarts is None:
            self.wait_ready()
            restarts = min(1, int(self.restarts() - counted))
        wrong = self._settled(before, counted, restarts, max_rss_growth)
        slow: list[str] = []
        if running:
            wrong += check_streams(self.solos, running.streams, bool(restarts))
            excused = ("/health/ready",) if restarts else ()
            wrong += check_probes(running.probes, excused=excused)
            slow = check_probe_times(running.probes, self.scale)
            self.failures += [(500, s.error) for s in running.streams if s.endings == ["error"]]
        for status, text in self.failures:
            wrong += check_error_body(status, text, (self.canary, *self.keys, *foreign))
        lines = self.server.output[num_lines:]
        num_failed = len(self.failures) + failed + restarts
        wrong += check_log(lines, num_failed, (self.canary, *self.keys, *foreign))
        assert not wrong, "\n".join([*wrong, "", *self.server.output[-20:]])
        if slow:
            raise TooSlow("\n".join(slow))

    def _settled(
        self, before: Snapshot, counted: float, restarts: int, max_rss_growth: int
    ) -> list[str]:
        """I1, I2, I3 and I6, which have `SETTLE_S` to become true."""
        deadline = time.monotonic() + SETTLE_S * self.scale
        while True:
            wrong = check_blocks(self.server.metrics())
            after = self.snapshot()
            wrong += check_restarts(before, after, counted, self.restarts(), restarts)
            wrong += check_leaks(before, after, max_rss_growth)
            if not wrong or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        canary = self.solos[0]
        got = self.complete(canary.prompt, len(canary.token_ids))["token_ids"]
        return wrong + check_canary(canary, got)

    def __enter__(self) -> "Bench":
        try:
            return self.start()
        except BaseException:
            self.server.__exit__(AssertionError, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._clients.close()
        self.server.__exit__(kind, error, tb)
