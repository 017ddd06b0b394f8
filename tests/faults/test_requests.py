# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What one request can ask for: grammars (T12, T13), long prompts (T31), places and files that are
not its own (T07), templates (T40), tensors (T42), anything at all (T51)."""

import functools
import http.server
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.clock import TooSlow
from tests.helpers.faults import Bench, Load, run_stream
from tests.helpers.invariants import Ended
from tests.helpers.raw_http import post_text

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
slow = pytest.mark.faults


@pytest.fixture(scope="module")
def warm(bench: Bench) -> Bench:
    """With a compiler of grammars, which the first one starts, and both threads that ask it."""
    schemas = [{"enum": [f"{turn} {n}" for n in range(2000)]} for turn in range(12)]

    def ask(schema: Any) -> None:
        body = {"prompt": "a", "max_tokens": 1, "response_format": schema_format(schema)}
        assert bench.http.post(COMPLETIONS, json=body).status_code in (200, 429, 503)

    ask({})
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, schemas))
    return bench


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def gaps(streams: list[Ended]) -> list[float]:
    """Seconds between the tokens of the streams."""
    found: list[float] = []
    for stream in streams:
        found += [b - a for a, b in zip(stream.times, stream.times[1:], strict=False)]
    return found


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"oneOf": [schema, {"type": "array", "items": schema}]}
    return schema


RECURSIVE = {
    "$defs": {"a": {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#"}}]}},
    "$ref": "#/$defs/a",
}
HOSTILE: dict[str, dict[str, Any]] = {
    "oneOf6": {"response_format": schema_format(nested(6))},
    "oneOf12": {"response_format": schema_format(nested(12))},
    "oneOf20": {"response_format": schema_format({"oneOf": [nested(13)] * 20})},
    "recursive": {"response_format": schema_format(RECURSIVE)},
    "power": {"structured_outputs": {"regex": "(x{1000}){1000}"}},
    "parentheses": {"structured_outputs": {"regex": "(" * 60_000 + ")" * 60_000}},
    "brackets": {"structured_outputs": {"grammar": "root ::= " + "(" * 30_000}},
    "enum": {
        "response_format": schema_format({"enum": [f"{i}" + "x" * 50 for i in range(20_000)]})
    },
    "properties": {
        "response_format": schema_format(
            {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}}
        )
    },
}


@functools.cache
def hostile_fields(name: str) -> bytes:
    """The rest of a body; up to 10 MB, which would keep our own probes waiting while written."""
    return json.dumps(HOSTILE[name])[1:].encode()


def ask_hostile(bench: Bench, name: str, turn: int = 0) -> None:
    """A 400, an overload where many come at once, or an answer; soon."""
    body = b'{"prompt": "%d", "max_tokens": 2, %b' % (turn, hostile_fields(name))
    began = time.monotonic()
    answer = bench.http.post(
        COMPLETIONS, content=body, headers={"content-type": "application/json"}
    )
    took = time.monotonic() - began
    assert answer.status_code in (200, 400, 503), (name, answer.text)
    if took > 3.5 * bench.scale:
        raise TooSlow(f"{name} took {took:.1f} s")


def busy(bench: Bench, seconds: float) -> float:
    """The most CPU seconds that one of the server's processes takes in `seconds`."""

    def read() -> dict[int, int]:
        found = {}
        for pid in bench.snapshot_pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[pid] = int(fields[11]) + int(fields[12])
        return found

    before = read()
    time.sleep(seconds)
    return max((n - before.get(pid, 0)) / 100 for pid, n in read().items())


@pytest.mark.parametrize(
    "name",
    [name if name == "recursive" else pytest.param(name, marks=slow) for name in HOSTILE],
)
def test_t12_hostile_grammars(warm: Bench, name: str) -> None:
    with warm.load_and_invariants(max_rss_growth=150 << 20):
        ask_hostile(warm, name)


@pytest.mark.faults
def test_t12_twenty_hostile_grammars_at_once(warm: Bench) -> None:
    """Others' tokens come no three times slower, and no core is busy two seconds later."""
    for name in HOSTILE:
        hostile_fields(name)
    load = Load(warm)
    load.wait_running()
    time.sleep(3)
    load.stop()
    quiet = p99(gaps(load.streams))
    with (
        warm.load_and_invariants(max_rss_growth=300 << 20) as running,
        ThreadPoolExecutor(20) as pool,
    ):
        assert running is not None
        list(pool.map(lambda n: ask_hostile(warm, list(HOSTILE)[n % len(HOSTILE)], n), range(20)))
        running.stop()
        time.sleep(2)
        spun = busy(warm, 1.0)
    if spun > 0.5:
        raise TooSlow(f"{spun:.2f} s of CPU a second, two seconds later")
    if (slow := p99(gaps(running.streams))) > 3 * quiet:
        raise TooSlow(f"p99 between tokens {slow:.4f} s, {quiet:.4f} s before")


BROKEN_GRAMMARS: list[dict[str, Any]] = [
    {"structured_outputs": {"json": ""}},
    {"structured_outputs": {"json": '{"type": "object"'}},
    {"structured_outputs": {"json_object": False}},
    {"structured_outputs": {"json": {"type": "nonsense"}}},
    {"structured_outputs": {"grammar": "root ::= missing"}},
    {"structured_outputs": {"grammar": "not a grammar at all"}},
    {"structured_outputs": {"regex": "a{5,1}"}},
    {"structured_outputs": {"regex": "(?=a)b"}},
    {"structured_outputs": {"choice": []}},
    {"response_format": schema_format({"not": {}})},
    {"response_format": schema_format({"enum": []})},
    {"response_format": {"type": "json_schema"}},
    {"response_format": schema_format({"$ref": "https://example.com/schema.json"})},
]


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=slow)])
def test_t13_grammars_that_are_none(warm: Bench, stream: bool) -> None:
    """400; and what bounds an answer to nothing, `^(|.*)$`, is still a grammar."""
    with warm.load_and_invariants():
        for fields in BROKEN_GRAMMARS:
            body = {"prompt": "a", "max_tokens": 4, "stream": stream} | fields
            answer = warm.http.post(COMPLETIONS, json=body)
            assert answer.status_code == 400, (fields, answer.text)
        for regex in ("^(|.*)$", "a|b"):
            body = {"prompt": "a", "max_tokens": 6, "structured_outputs": {"regex": regex}}
            answer = warm.http.post(COMPLETIONS, json=body)
            assert answer.status_code in (200, 400), answer.text
            if regex == "a|b" and answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] in ("a", "b")
        dead_end = {"structured_outputs": {"regex": "a[^\\x00-\\U0010ffff]b"}}
        body = {"prompt": "a", "max_tokens": 6, "stream": stream} | dead_end
        answer = warm.http.post(COMPLETIONS, json=body)
        assert answer.status_code == 400 or answer.text.count('"error"') == 1, answer.text


@pytest.mark.faults
def test_t31_long_prompts_do_not_hold_up_others(bench: Bench) -> None:
    """A prompt of full length every second beside eight streams."""

    def streams() -> list[Ended]:
        with ThreadPoolExecutor(8) as pool:
            return list(
                pool.map(
                    lambda n: run_stream(bench.http, n % 4, bench.solos[n % 4].prompt, 1500),
                    range(8),
                )
            )

    rng, stop = random.Random(31), threading.Event()

    def prompts() -> None:
        with bench.client() as http:
            while not stop.wait(1.0):
                ids = [rng.randrange(300) for _ in range(2040)]
                body = {"prompt": ids, "max_tokens": 1}
                assert http.post(COMPLETIONS, json=body).status_code == 200

    with bench.load_and_invariants(load=False):
        quiet = p99(gaps(streams()))
        thread = threading.Thread(target=prompts)
        thread.start()
        loud = p99(gaps(streams()))
        stop.set()
        thread.join()
    if loud > 3 * quiet:
        raise TooSlow(f"p99 between tokens {loud:.4f} s, {quiet:.4f} s without the prompts")


class _Rogue(http.server.BaseHTTPRequestHandler):
    hits: list[str] = []

    def do_GET(self) -> None:
        self.hits.append(self.path)
        self.send_response(200)
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def rogue() -> Iterator[int]:
    """The port of a server that nobody may ask."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Rogue) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()
    assert not _Rogue.hits


def test_t07_no_url_and_no_file_is_read(bench: Bench, rogue: int, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    urls = [
        f"http://127.0.0.1:{rogue}/a", f"http://localhost:{rogue}/", f"http://[::1]:{rogue}/",
        f"http://[::ffff:127.0.0.1]:{rogue}/", f"http://2130706433:{rogue}/",
        f"http://0177.0.0.1:{rogue}/", f"http://a@127.0.0.1:{rogue}/", f"http:/\\127.0.0.1:{rogue}",
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/", f"file://{secret}",
        str(secret), "data:image/png;base64,AAAA", "ftp://127.0.0.1/",
    ]  # fmt: skip
    with bench.load_and_invariants():
        for url in urls:
            for part in (
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image_url", "image_url": url},
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "audio_url", "audio_url": {"url": url}},
                {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
                {"type": "file", "file": {"file_id": url}},
            ):
                body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
                assert bench.http.post(CHAT, json=body).status_code == 400, part
            for field in ("chat_template", "model", "documents"):
                body = {"messages": [{"role": "user", "content": "a"}], field: url}
                assert bench.http.post(CHAT, json=body).status_code in (400, 404), field
            fields = {"response_format": schema_format({"$ref": url})}
            body = {"prompt": "a", "max_tokens": 1} | fields
            assert bench.http.post(COMPLETIONS, json=body).status_code == 400
        assert not any("the secret" in text for _, text in bench.failures)
        bench.failures.clear()  # the paths in them are the client's own


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch %s').read() }}",
    "{% for a in range(99999999) %}{% for b in range(99999999) %}x{% endfor %}{% endfor %}",
    "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "{{ 'a' * 999999999 }}",
)


def test_t40_a_request_brings_no_template(bench: Bench, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    with bench.load_and_invariants():
        for escape in ESCAPES:
            text = escape.replace("%s", str(canary))
            messages = [{"role": "user", "content": text}]
            for fields in (
                {"chat_template": text},
                {"chat_template_kwargs": {"chat_template": text}},
                {"chat_template_kwargs": {"tokenize": True}},
                {"chat_template_kwargs": {"tools": [text]}},
                {"chat_template_kwargs": {"messages": [text]}},
            ):
                body = {"messages": messages, "max_tokens": 1} | fields
                assert bench.http.post(CHAT, json=body).status_code == 400, fields
            for fields in ({}, {"chat_template_kwargs": {"x": {"deep": [text]}}}):  # it is text
                body = {"messages": messages, "max_tokens": 1} | fields
                assert bench.http.post(CHAT, json=body).status_code == 200
    assert not canary.exists()


@pytest.mark.faults
@pytest.mark.parametrize("template", [ESCAPES[2], ESCAPES[4]])
def test_t40_a_models_template_that_does_not_end(bench_model: Path, template: str) -> None:
    with Bench(bench_model, "--chat-template", template) as hostile:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        with hostile.load_and_invariants():
            began = time.monotonic()
            assert hostile.http.post(CHAT, json=body).status_code == 400
            took = time.monotonic() - began
    if took > 1.5 * hostile.scale:
        raise TooSlow(f"{took:.1f} s")


def test_t42_no_tensors(bench: Bench) -> None:
    with bench.load_and_invariants():
        for value in ("gASVCgAAAAAAAACMA29z", "A" * 1_000_000, ["AAAA"], {"shape": [2**31, 2**31]}):
            for prompt in ({}, {"prompt": "a"}):
                body = prompt | {"prompt_embeds": value, "max_tokens": 1}
                answer = bench.http.post(COMPLETIONS, json=body)
                assert answer.status_code == 400, answer.text


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -0.0, 1.5, "", "a", "\x00", "\ud800", "漢字",
    [], {}, [[]], [None], {"": None}, [1, 2, 3], [-1], ["a", 1], {"a": {"b": []}}, "x" * 5000,
    [0] * 3000,
]  # fmt: skip
FIELDS = [
    "prompt",
    "messages",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "stop",
    "stop_token_ids",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "user",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "guided_regex",
    "guided_json",
    "bad_words",
    "allowed_token_ids",
    "min_tokens",
    "ignore_eos",
    "echo",
    "suffix",
    "priority",
    "cache_salt",
    "request_id",
    "truncate_prompt_tokens",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "include_reasoning",
    "return_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "store",
    "metadata",
    "modalities",
    "audio",
    "reasoning_effort",
    "parallel_tool_calls",
    "documents",
    "vllm_xargs",
    "kv_transfer_params",
    "stream_n",
]


GOOD: list[tuple[str, dict[str, Any]]] = [
    *((COMPLETIONS, {"prompt": prompt}) for prompt in ("hi", [5, 6], [[5], [6]], ["a", "b"])),
    *((CHAT, {"messages": [{"role": "user", "content": text}]}) for text in ("hi", [])),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    ("/tokenize", {"prompt": "hi"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/detokenize", {"tokens": [5, 6]}),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
# What other rows send: each is laid over a good body, and then mutated with it.
HABITS: list[dict[str, Any]] = [
    {}, *BROKEN_GRAMMARS, *({"chat_template": escape} for escape in ESCAPES),
    {"stream": True, "stream_options": {"include_usage": True}}, {"n": 3, "temperature": 1.0},
    {"logprobs": 2, "echo": True, "prompt_logprobs": 1}, {"logprobs": True, "top_logprobs": 3},
    {"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL], "tool_choice": "required"},
    {"structured_outputs": {"regex": "a|b"}}, {"response_format": {"type": "json_object"}},
    {"response_format": schema_format(nested(3))}, {"logit_bias": {"5": 3}, "bad_words": ["a"]},
    {"stop": ["a"], "stop_token_ids": [5], "min_tokens": 1}, {"cache_salt": "a", "priority": 1},
    {"prompt_embeds": "AAAA"}, {"truncate_prompt_tokens": 1}, {"allowed_token_ids": [5, 6]},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) in a JSON value, however deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, Any]] = []
    for key, inner in items:
        found.append((value, key))
        found += places(inner) if isinstance(inner, dict | list) else []
    return found


def mutated(rng: random.Random) -> tuple[str, str]:
    """A path and a body: a good one, of which up to four things are something else."""
    path, good = rng.choice(GOOD)
    habit = rng.choice(HABITS) if path in (COMPLETIONS, CHAT) else {}
    body = deepcopy(good | {"max_tokens": 2} | habit)
    for _ in range(rng.randrange(1, 5)):
        if rng.random() < 0.4 and (inner := places(body)):
            container, key = rng.choice(inner)
            container[key] = deepcopy(rng.choice(VALUES))
        else:
            body[rng.choice(FIELDS)] = deepcopy(rng.choice(VALUES))
    text = json.dumps(body)
    for _ in range(rng.randrange(3) if rng.random() < 0.3 else 0):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("", "}", '"', "\\u0000", "1e999", ",")) + text[at + 1 :]
    return path, text


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=slow) for n in range(1, 51))])
def test_t51_anything_at_all(warm: Bench, part: int) -> None:
    """No answer but the declared ones: never a 500, and every error has its shape. The parts are of
    a thousand cases, so that a run that was ended goes on with the part that it came to."""
    rng = random.Random()
    cases = [mutated(rng) for _ in range(1000 if part else 400)]

    def ask(some: list[tuple[str, str]]) -> None:
        with warm.client() as client:
            for path, text in some:
                answer: httpx.Response = post_text(client, path, text)
                assert answer.status_code in (200, 400, 404, 415, 422, 429, 503), (
                    path, text[:2000], answer.text,
                )  # fmt: skip
                assert '"code":"server_error"' not in answer.text, (path, text[:2000])

    with (
        warm.load_and_invariants(max_rss_growth=40 << 20),
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(ask, [cases[n::4] for n in range(4)]))
        for _, text in warm.failures:  # what they themselves sent may be in it
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        warm.failures.clear()
