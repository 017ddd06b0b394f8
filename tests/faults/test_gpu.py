# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""On a GPU: T03, T04, T05, T23, T34 and deaths at random moments. The memory of the device comes
back each time; how long a restart took is printed (-s)."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.clock import TooSlow
from tests.helpers.faults import MAX_MODEL_LEN, Bench, run_stream
from tests.helpers.server import Server
from tests.helpers.tiny_models import write_tiny_model

pytestmark = pytest.mark.gpu
SLACK_MB = 64  # of what others on the device do meanwhile
RESTART_S = 30.0
ON_GPU = ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.3")


def used_mb() -> int:
    """Of the first device."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.check_output(query, text=True))


def until(done: Callable[[], bool], seconds: float, what: str) -> float:
    """How long it took."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > seconds:
            raise TooSlow(f"{what} took over {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("gpu"), "llama", hidden_size=256, intermediate_size=512,
        num_attention_heads=8, max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def bench(model: Path) -> Iterator[Bench]:
    """A server of its own for each row; the device is as before once it has gone."""
    before = used_mb()
    with Bench(model, *ON_GPU, "--engine-hang-timeout", "5") as started:
        yield started
    until(lambda: used_mb() <= before + SLACK_MB, 5, "giving back the device's memory")


def lose(bench: Bench, number: int, name: str) -> None:
    """The engine gets a signal under load; it comes back, and no memory of the old one stays."""
    held, restarts = used_mb(), bench.restarts()
    with ThreadPoolExecutor(16) as pool:
        streams = [
            pool.submit(run_stream, bench.http, 0, bench.solos[0].prompt + f" {n}", 1500)
            for n in range(16)
        ]
        time.sleep(random.uniform(0.0, 1.0))
        os.kill(bench.engine_pid(), number)
        began = time.monotonic()
        for stream in streams:
            ended = stream.result(120)
            assert ended.status in (200, 503) and not ended.cut, ended
            assert len(ended.endings) == (ended.status == 200), ended
    until(lambda: bench.restarts() > restarts, 30, "noticing")
    until(lambda: bench.http.get("/health/ready").status_code == 200, 60, "the restart")
    took = time.monotonic() - began
    print(f"\n{name}: serves again after {took:.1f} s; {held} MB before, {used_mb()} MB after")
    assert used_mb() <= held + SLACK_MB
    canary = bench.solos[0]
    assert bench.complete(canary.prompt, len(canary.token_ids))["token_ids"] == canary.token_ids
    if took > RESTART_S * bench.scale:
        raise TooSlow(f"the restart took {took:.1f} s")


def test_t03_killed_at_random_moments(bench: Bench) -> None:
    for turn in range(3):  # as often as it may be
        lose(bench, signal.SIGKILL, f"kill {turn}")
    bench.check_idle()


def test_t04_stopped(bench: Bench) -> None:
    lose(bench, signal.SIGSTOP, "stop")
    bench.check_idle()


@pytest.mark.parametrize("seconds", [None, 1.0, 3.0, 6.0])
def test_t05_killed_supervisor(model: Path, seconds: float | None) -> None:
    """Serving, and at moments of the start."""
    before = used_mb()
    server = Server(str(model), *ON_GPU)
    if seconds is None:
        server.wait_ready()
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(run_stream, server.http, 0, "go on", 1500)
            time.sleep(0.5)
            server.process.kill()
            assert ended.result(20).cut or ended.result().endings == ["done"]
    else:
        time.sleep(seconds)
        server.process.kill()
    server.wait()
    took = until(lambda: used_mb() <= before + SLACK_MB, 10, "giving back the device's memory")
    print(f"\nkilled after {seconds} s: memory back after {took:.1f} s")
    server.http.close()


def test_t23_more_requests_than_blocks(model: Path) -> None:
    """A pool of 1.2 requests of full length: all end, with as many tokens as they asked for."""
    with Bench(model, *ON_GPU, "--num-gpu-blocks-override", "154") as tight:
        before = tight.server.metrics()["vllm:num_preemptions_total"]
        with ThreadPoolExecutor(16) as pool:
            ended = list(
                pool.map(
                    lambda n: run_stream(tight.http, n % 4, f"{n} " * (20 + 12 * n), 220), range(16)
                )
            )
        assert all(stream.endings == ["done"] for stream in ended)
        assert all(len(stream.token_ids) == 220 for stream in ended)
        assert tight.server.metrics()["vllm:num_preemptions_total"] > before
        tight.check_idle()


def test_t34_logprobs_of_whole_prompts(model: Path) -> None:
    """Eight prompts of full length with log-probabilities of every position, where the KV cache has
    nearly all of the device."""
    flags = ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.95", "--max-model-len", "2048")
    with Server(str(model), *flags) as server:
        pid = server.pid_of("llmserve.engine.process")
        rng = random.Random(34)

        def ask(index: int) -> int:
            body = {
                "prompt": [rng.randrange(5, 300) for _ in range(2040)], "max_tokens": 2,
                "prompt_logprobs": 20, "echo": True, "logprobs": 5,
            }  # fmt: skip
            return server.http.post("/v1/completions", json=body).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(ask, range(24)))
        assert set(statuses) <= {200, 400}, statuses
        assert server.post("/v1/completions", prompt="a", max_tokens=2)
        assert server.pid_of("llmserve.engine.process") == pid and os.path.exists(f"/proc/{pid}")
