# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import time
from pathlib import Path
from typing import cast

import pytest

from llmserve.cli.bench import serve
from llmserve.cli.bench.http import Target
from llmserve.cli.bench.serve import ServeBench, wait_ready
from llmserve.cli.client import Client
from llmserve.errors import ConfigError, EngineError
from tests.helpers.clock import calibrate, in_time
from tests.helpers.fake_openai import FakeOpenAI, fake_openai

KEYS = {
    "date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency",
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
    *(f"{stat}_{metric}_ms" for stat in ("mean", "median", "std", "p99")
      for metric in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip


def run(server: FakeOpenAI, *argv: str) -> int:
    return serve.run(["--base-url", server.url, "--disable-tqdm", "--num-prompts", "8", *argv])


@pytest.mark.parametrize("backend", ["openai", "openai-chat", "vllm"])
def test_table_of_a_scripted_server(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First word after 50 ms, three more 20 ms apart."""
    with fake_openai(["a", "b", "c", "d"], 0.05, 0.02) as server:
        code = run(
            server, "--backend", backend, "--random-input-len", "6", "--random-output-len", "4",
            "--max-concurrency", "4", "--percentile-metrics", "ttft,tpot,itl,e2el",
            "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json",
            "--ignore-eos", "--metadata", "note=x",
        )  # fmt: skip
        path = "/v1/chat/completions" if backend == "openai-chat" else "/v1/completions"
        bodies = server.bodies(path)
        assert server.most_running == 4
    assert code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record.keys() >= KEYS and "ttfts" not in record and record["note"] == "x"
    assert record["completed"] == 8 and record["total_output_tokens"] == 32
    slower = calibrate()
    for what, least, more in (
        ("ttft", 50, 40),
        ("itl", 20, 15),
        ("tpot", 20, 15),
        ("e2el", 110, 60),
    ):
        assert record[f"median_{what}_ms"] >= least
        in_time(record[f"median_{what}_ms"] / 1000, (least + more * slower) / 1000)
    assert record["duration"] > 0.2
    in_time(record["duration"], 0.2 + 0.4 * slower)
    out = capsys.readouterr().out
    assert f"{'Successful requests:':<40} 8" in out
    assert f"{'Maximum request concurrency:':<40} 4" in out
    assert len(bodies) == 8 and all(body["ignore_eos"] and body["stream"] for body in bodies)
    assert all(body["max_tokens"] == 4 for body in bodies)
    if backend != "openai-chat":
        assert {len(body["prompt"]) for body in bodies} == {6}
        assert record["total_input_tokens"] == 48


def test_failed_requests_are_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "p.jsonl"
    data.write_text('{"prompt": "good"}\n{"prompt": "fail"}\n{"prompt": "cut"}\n{"prompt": "ok"}')
    argv = ["--dataset-name", "custom", "--dataset-path", str(data), "--goodput", "ttft:1000",
            "--save-detailed", "--result-dir", str(tmp_path), "--result-filename",
            "r.json"]  # fmt: skip
    with fake_openai() as server:
        assert run(server, *argv) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["completed"], record["failed"]) == (4, 4)
    assert record["request_goodput"] == pytest.approx(record["request_throughput"])
    assert len(record["ttfts"]) == 8 and record["itls"][1] == []
    assert sum("scripted failure" in error for error in record["errors"]) == 2
    assert "4 failed, for example: " in capsys.readouterr().out
    data.write_text('{"prompt": "fail"}')
    with fake_openai() as server:
        assert run(server, *argv) == 1


def test_requests_come_at_their_rate() -> None:
    with fake_openai() as server:
        start = time.perf_counter()
        assert run(server, "--request-rate", "20", "--burstiness", "1e6") == 0
        took = time.perf_counter() - start
    assert took >= 0.35
    in_time(took, 1.5 * calibrate())


async def test_arrival_intervals_have_rate_and_burstiness() -> None:
    draws = {}
    for burstiness in (0.25, 1.0, 100.0):
        times = []
        async for _ in serve.arrivals(200, 1000.0, burstiness, 3):
            times.append(time.perf_counter())
        draws[burstiness] = times[-1] - times[0]
    assert min(draws.values()) > 0.1, draws
    in_time(max(draws.values()), 0.45 * calibrate())


async def test_a_dead_server_fails_one_request_not_the_run() -> None:
    with fake_openai() as server:
        target = Target.make(server.url, "/v1/completions", None)
    result = await serve.send(target, b"{}")
    assert not result.success and "Connect" in result.error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset-name", "sharegpt"], "--dataset-name must be one of random, custom"),
        (["--dataset-name", "custom"], "needs --dataset-path"),
        (["--request-rate", "0"], "--request-rate must be above 0"),
        (["--goodput", "itl:5"], "--goodput must look like"),
        (["--goodput", "ttft"], "--goodput must look like"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics must be of"),
        (["--metric-percentiles", "101"], "--metric-percentiles must be 0 to 100"),
        (["--num-promts", "1"], "did you mean --num-prompts"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_sent(argv: list[str], message: str) -> None:
    with fake_openai() as server:
        with pytest.raises(ConfigError, match=message):
            run(server, *argv)
        assert server.requests == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metadata", "foo"], "--metadata must look like KEY=VALUE, got 'foo'"),
        (["--dataset-path", "x"], "--dataset-path needs --dataset-name custom"),
        (["--goodput", "ttft:nan"], "--goodput must look like"),
    ],
    ids=["metadata", "path", "goodput"],
)
def test_options_without_effect_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message), fake_openai() as server:
        run(server, *argv)


def test_a_folder_that_cannot_be_is_said_before_the_load(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with fake_openai() as server:
        with pytest.raises(NotADirectoryError):
            run(server, "--save-result", "--result-dir", str(tmp_path / "file" / "x"))
        assert server.requests == []


def test_it_says_whom_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = [EngineError("no answer from http://x: Connection refused")] * 3

    class Late:
        def model(self) -> str:
            if refusals:
                raise refusals.pop()
            return "m"

    assert wait_ready(ServeBench(ready_check_timeout_sec=60), cast(Client, Late())) == "m"
    said = capsys.readouterr().err
    assert said == "waiting up to 60 s: no answer from http://x: Connection refused\n"
