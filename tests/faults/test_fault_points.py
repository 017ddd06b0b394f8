# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T11 and T17: one request's code raises, or its numbers are none; T35: the Nth call of what the
system gives (memory, files, threads, processes, sockets) fails. The faults are planted from outside
the package, by tests/helpers/fault_points."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers import broken_processor
from tests.helpers.clock import TooSlow
from tests.helpers.fault_points import sitecustomize as points
from tests.helpers.faults import FLAGS, Bench, run_stream
from tests.helpers.raw_http import Raw, vanish
from tests.helpers.server import Server

ROOT = Path(__file__).parents[2]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


def environment(folder: Path) -> dict[str, str]:
    paths = (Path(points.__file__).parent, ROOT / "src", ROOT)
    return {"PYTHONPATH": ":".join(map(str, paths)), "LLMSERVE_TEST_FAULTS": str(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def planted(bench_model: Path, folder: Path) -> Iterator[Bench]:
    """A server in which the faults of single requests are planted."""
    flags = (
        "--logits-processors", "tests.helpers.broken_processor:Broken",
        "--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    )  # fmt: skip
    with Bench(bench_model, *flags, env=environment(folder)) as bench:
        for path, fields in ONE_REQUEST.values():  # what starts with the first of its kind
            if "seed" in fields:
                bench.server.post(path, **fields | {"seed": 1, "max_tokens": 12})
        yield bench


def chat(text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": text}]} | fields


ONE_REQUEST: dict[str, tuple[str, dict[str, Any]]] = {
    "sampler_add": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_ADD}),
    "sampler_apply": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_APPLY}),
    "sampler_update": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_UPDATE}),
    "grammar": (
        COMPLETIONS, {"prompt": "a", "seed": points.GRAMMAR, "response_format": FORMAT}
    ),
    "detokenizer": (COMPLETIONS, {"prompt": "a", "seed": points.DETOKENIZER}),
    "parser": chat("a", seed=points.PARSER, tools=TOOLS),
    "tokenizer": (COMPLETIONS, {"prompt": f"{points.WORD} tokenizer"}),
    "tokenizer_thread": (COMPLETIONS, {"prompt": f"{points.WORD} tokenizer" + " a" * 900}),
    "template": chat(f"{points.WORD} template"),
    "admission": (COMPLETIONS, {"prompt": "a", "seed": points.ADMISSION}),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_t11_what_is_one_requests_fails_it_alone(planted: Bench, stream: bool) -> None:
    """An error of its own, whatever the exception says; and the same request works without it."""
    with planted.load_and_invariants():
        for name, (path, fields) in ONE_REQUEST.items():
            body = fields | {"max_tokens": 12, "ignore_eos": True, "stream": stream}
            answer = planted.http.post(path, json=body)
            if stream and answer.status_code == 200:  # it had begun
                events = [e for e in answer.text.split("\n\n") if e.startswith("data: ")]
                error = json.loads(events[-1][6:])["error"]
                assert "[DONE]" not in answer.text, name
                planted.failures.append((500, events[-1][6:]))
            else:
                assert answer.status_code == 500, (name, answer.text)
                error = answer.json()["error"]
            assert error["code"] == "server_error" or error["type"] == "server_error", error
            if "seed" in body:
                answer = planted.http.post(path, json=body | {"seed": 1})
                assert answer.status_code == 200 and '"error"' not in answer.text, answer.text


def test_t15_two_steps_at_most_after_a_client_has_gone(planted: Bench) -> None:
    """Steps that are long enough to be counted; a third may end between the count and the reset."""
    raw = Raw(planted.server.url, planted.keys[0])

    def steps(running: int) -> float:
        deadline = time.monotonic() + 10
        while (m := planted.server.metrics())["vllm:num_requests_running"] != running:
            assert time.monotonic() < deadline
        return m["llmserve:engine_steps_total"]

    with planted.load_and_invariants(load=False):
        for turn in range(6):
            body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True,
                    "seed": broken_processor.SLOW, "stream": turn % 2 == 0}  # fmt: skip
            sock = raw.connect(raw.request(COMPLETIONS, body))
            before = steps(1)
            time.sleep(3 * broken_processor.STEP_S)
            assert steps(1) > before
            before = steps(1)
            vanish(sock)
            more = steps(0) - before
            if more > 3:
                raise TooSlow(f"{more:g} steps after the client had gone")


def test_a_processor_that_fails_at_the_end_fails_nobody(planted: Bench) -> None:
    with planted.load_and_invariants(failed=1):
        body = {"prompt": "a", "seed": broken_processor.IN_REMOVE, "max_tokens": 3}
        assert planted.http.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize(
    "seed", [points.NAN_PROMPT, pytest.param(points.NAN_LATER, marks=pytest.mark.faults)]
)
def test_t17_a_nan_that_passes(planted: Bench, seed: int) -> None:
    """NaN once, in hidden states and KV alike, of the prompt's or the 20th step: the same prompt
    then gives what it always gave, out of a cache that has nothing of it."""
    prompt = [11 + (seed + n) % 300 for n in range(200)]
    golden = planted.complete(prompt, 60, cache_salt="of the reference")["token_ids"]
    body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    with planted.load_and_invariants():
        for _ in range(3):
            failed = planted.http.post(COMPLETIONS, json=body | {"seed": seed})
            assert failed.status_code == 500, failed.text
            assert failed.json()["error"]["code"] == "numerical_error"
            again = planted.http.post(COMPLETIONS, json=body | {"return_token_ids": True}).json()
            assert again["choices"][0]["token_ids"] == golden
            assert not again["usage"]["prompt_tokens_details"]["cached_tokens"]
            prompt = body["prompt"] = [prompt[-1], *prompt[:-1]]
            golden = planted.complete(prompt, 60, cache_salt="of the reference")["token_ids"]


STARTS = (
    "open-supervisor", "fork-supervisor", "open-engine", "thread-engine", "send-engine",
    "linear-engine", "open-api", "thread-api",
)  # fmt: skip


def numbers(name: str) -> Iterator[int]:
    """1, 2, 3 ...; 1, 2, 3, 5, 8, 13 ... of what is done in every step."""
    n, before = 1, 1
    while True:
        yield n
        n, before = (n + before, n) if name.startswith(("linear", "send-engine")) else (n + 1, n)


def start_with(model: Path, folder: Path, name: str, n: int) -> bool:
    """One start in which the `n`th call fails: it says why it ends, or serves all the same. Whether
    there were as many calls."""
    points.arm(str(folder), name, n)
    server = Server(str(model), *FLAGS, env=environment(folder))
    deadline = time.monotonic() + 60
    while "Application startup complete." not in server.text and server.process.poll() is None:
        assert time.monotonic() < deadline, server.text
        time.sleep(0.02)
    if server.process.poll() is None:
        with server:
            body = {"prompt": "a", "max_tokens": 4}
            status = server.http.post(COMPLETIONS, json=body).status_code
            failed = points.disarm(str(folder), name)
            assert status == 200 or (failed and status in (500, 503))
        return failed
    assert server.wait() in (1, 2), server.text
    last = server.text.rstrip().rpartition("\n")[2]
    assert last.startswith("llmserve: error: ") and len(last) < 300, server.text
    server.check_gone()
    server.runtime.rmdir()
    return points.disarm(str(folder), name)


@pytest.mark.parametrize("name", ["fork-supervisor"])
def test_t35_a_start_whose_first_call_fails(bench_model: Path, tmp_path: Path, name: str) -> None:
    assert start_with(bench_model, tmp_path, name, 1)


@pytest.mark.faults
@pytest.mark.parametrize("name", STARTS)
def test_t35_a_start_whose_nth_call_fails(bench_model: Path, tmp_path: Path, name: str) -> None:
    for n in numbers(name):
        if not start_with(bench_model, tmp_path, name, n):
            break
    assert n > 1, "nothing was tried"


def work(bench: Bench, golden: list[int], turn: str) -> None:
    """A stream, a whole answer, a long prompt and a grammar at once: each is right, or says so."""

    def ask(fields: dict[str, Any]) -> httpx.Response:
        return bench.http.post(COMPLETIONS, json={"max_tokens": 8, "temperature": 0} | fields)

    schema = {"type": "object", "properties": {f"p{turn}": {"type": "integer"}}}
    bodies: list[dict[str, Any]] = [
        {"prompt": "whole", "ignore_eos": True, "return_token_ids": True, "cache_salt": turn},
        {"prompt": f"{turn} " + "x y " * 300, "logprobs": 2},
        {"prompt": "a", "response_format":
            {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
    ]  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        stream = pool.submit(run_stream, bench.http, 0, bench.solos[0].prompt, 16)
        answers = list(pool.map(ask, bodies))
        ended = stream.result(90)
    for answer in answers:
        assert answer.status_code in (200, 500, 503), answer.text
    if answers[0].status_code == 200:
        assert answers[0].json()["choices"][0]["token_ids"] == golden
    if ended.status == 200:
        assert len(ended.endings) == 1 and not ended.cut, ended
    if ended.endings == ["done"]:
        assert ended.token_ids == bench.solos[0].token_ids[:16]


RUNNING = ("allocate-engine", "linear-engine", "send-engine", "send-api")
COMPILING = (
    "open-engine", "fork-engine", "thread-engine", "open-compiler", "thread-compiler",
)  # fmt: skip


def fail_while(bench: Bench, folder: Path, name: str, n: int, golden: list[int]) -> bool:
    """The `n`th call of `work` fails; whether there were as many."""
    with bench.load_and_invariants(restarts=None, load=False, max_rss_growth=60 << 20):
        points.arm(str(folder), name, n)
        work(bench, golden, f"turn{n}")
        failed = points.disarm(str(folder), name)
    return failed


@pytest.mark.parametrize("name", ["send-api", "allocate-engine"])
def test_t35_the_first_call_of_a_running_server(planted: Bench, folder: Path, name: str) -> None:
    golden = planted.complete("whole", 8)["token_ids"]
    work(planted, golden, f"warm {name}")
    assert fail_while(planted, folder, name, 1, golden)


@pytest.mark.faults
@pytest.mark.parametrize("name", RUNNING)
def test_t35_the_nth_call_of_a_running_server(bench_model: Path, tmp_path: Path, name: str) -> None:
    turns, tried = numbers(name), 0
    while True:
        with Bench(bench_model, env=environment(tmp_path)) as bench:
            golden = bench.complete("whole", 8)["token_ids"]
            while bench.restarts() < 3:  # as often as it may be
                work(bench, golden, f"warm{tried}")  # whose grammar starts the compiler
                if not fail_while(bench, tmp_path, name, next(turns), golden):
                    assert tried, "nothing failed"
                    return
                tried += 1


@pytest.mark.faults
@pytest.mark.parametrize("name", COMPILING)
def test_t35_the_nth_call_of_the_first_grammar(
    bench_model: Path, tmp_path: Path, name: str
) -> None:
    """The request may get an error; the next one of its kind works."""
    schema = {"type": "json_object"}
    body = {"prompt": "a", "max_tokens": 4, "response_format": schema}
    for n in numbers(name):
        with Bench(bench_model, env=environment(tmp_path)) as bench:
            points.arm(str(tmp_path), name, n)
            first = bench.http.post(COMPLETIONS, json=body)
            failed = points.disarm(str(tmp_path), name)
            assert first.status_code == 200 or failed, first.text
            bench.wait_ready()
            assert bench.http.post(COMPLETIONS, json=body).status_code == 200
            with bench.load_and_invariants(load=False):
                assert bench.http.post(COMPLETIONS, json=body).status_code == 200
        if not failed:
            break
    assert n > 1, "nothing failed"
