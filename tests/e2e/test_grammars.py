# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Requests that are bound to grammars, however they are scheduled.

A tiny random model at temperature 1 says anything that its mask allows: whatever it finishes has
to be valid. Each test asserts from counters that what it is about has happened.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from llmserve import LLM, SamplingParams
from llmserve.core.structured_outputs import GRAMMAR_ERROR, GrammarSpec, StructuredOutputsParams
from llmserve.errors import OverloadedError, RequestError
from llmserve.frontend.tokenizer import Tokenizer, load_tokenizer
from llmserve.sampling import grammar as grammar_module
from llmserve.structured_output.manager import GrammarManager
from llmserve.structured_output.prepare import prepare
from tests.helpers.clock import calibrate, in_time
from tests.helpers.engine import Engine, Result, engines_of
from tests.helpers.server import Server, processes_of
from tests.helpers.tiny_models import EOS_ID, write_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["a", "bc", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind"],
}
LOOSE = {"type": "object", "properties": {"n": {"type": "boolean"}, "m": {"type": "null"}}}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 90}
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(folder, "llama", seed=3, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Callable[..., Engine]]:
    with engines_of(model) as get:
        yield get


def _spec(schema: Any = SCHEMA, backend: str = "guidance", **fields: Any) -> GrammarSpec:
    asked = fields or {"json": schema, "disable_any_whitespace": True}
    return prepare(StructuredOutputsParams(**asked), backend)


def _text(tokenizer: Tokenizer, result: Result) -> str:
    return tokenizer.decode(result.token_ids)


def _check(tokenizer: Tokenizer, result: Result, schema: Any = SCHEMA) -> bool:
    """Whether it came to an end; then it is valid, else it was cut by length."""
    assert result.finish_reason in ("stop", "length"), result.extras
    if result.finish_reason == "length":
        return False
    text = _text(tokenizer, result)
    jsonschema.validate(json.loads(text), schema)
    assert result.token_ids[-1] == EOS_ID
    return True


def _run(engine: Engine, count: int, schema: Any = SCHEMA, **fields: Any) -> list[Result]:
    spec = fields.pop("grammar", None) or _spec(schema)
    seeds = random.sample(range(10**6), count)
    ids = [engine.add(PROMPT, **SAMPLED | fields, seed=seed, grammar=spec) for seed in seeds]
    engine.run()
    return [engine.results[i] for i in ids]


@pytest.mark.parametrize("backend", ["xgrammar", "guidance"])
def test_what_ends_is_valid(
    engine: Callable[..., Engine], tokenizer: Tokenizer, backend: str
) -> None:
    one = engine()
    steps, masks = one.core.stats().num_steps, one.core.grammars.num_masks  # type: ignore[union-attr]
    results = _run(one, 12, LOOSE, grammar=_spec(LOOSE, backend))
    assert sum(_check(tokenizer, result, LOOSE) for result in results) >= 6
    assert one.core.grammars is not None
    assert one.core.grammars.num_masks - masks >= sum(len(r.token_ids) for r in results)
    assert one.core.stats().num_steps > steps
    assert one.core.stats().max_in_flight == 2
    assert not one.core.grammars._walks and not one.core.grammars._waiting


def test_beside_free_requests(engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    one = engine()
    free = [one.add(PROMPT, temperature=0.7, seed=i) for i in range(3)]
    bound = _run(one, 4)
    alone = one.generate([PROMPT], temperature=0.7, seed=1)[0]
    assert [len(one.results[i].token_ids) for i in free] == [16] * 3
    assert one.results[free[1]].token_ids == alone, "a free row is drawn as without neighbours"
    assert any(_check(tokenizer, result) for result in bound)


def test_overlapped_equals_synchronous(engine: Callable[..., Engine]) -> None:
    def tokens(one: Engine) -> list[list[int]]:
        ids = [one.add(PROMPT, **SAMPLED, seed=seed, grammar=_spec()) for seed in range(6)]
        one.run()
        return [one.results[i].token_ids for i in ids]

    assert tokens(engine()) == tokens(engine(async_scheduling=False))


def test_chunked_and_cached(engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    small = engine(max_num_batched_tokens=16)
    prompt = random.choices(range(5, 120), k=70)
    chunks = small.core.stats().num_chunked_prefills
    for _ in range(2):
        ids = [small.add(prompt, **SAMPLED, seed=s, grammar=_spec()) for s in range(2)]
        small.run()
    assert small.core.stats().num_chunked_prefills > chunks
    assert small.results[ids[0]].num_cached_tokens == 64
    for i in ids:
        _check(tokenizer, small.results[i])


def test_preempted(engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    tight = engine(num_gpu_blocks_override=14, max_model_len=160)
    wide = engine()
    grammar = _spec(regex="[a-z]{300,400}")
    seeds = range(4)

    def texts(one: Engine) -> list[list[int]]:
        ids = [one.add(PROMPT, **SAMPLED | {"max_tokens": 120}, seed=s, grammar=grammar)
               for s in seeds]  # fmt: skip
        one.run()
        return [one.results[i].token_ids for i in ids]

    assert texts(tight) == texts(wide)
    assert tight.core.stats().num_preemptions > 0
    assert wide.core.stats().num_preemptions == 0


def test_a_request_that_waits_for_its_grammar_holds_nothing(engine: Callable[..., Engine]) -> None:
    one = engine()
    spec = _spec(regex="a{3}")
    waiting = one.add(PROMPT, **SAMPLED, grammar=spec)
    stats = one.core.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 1)
    assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total
    assert not one.core.has_work, "the engine sleeps meanwhile"
    one.core.scheduler.check_integrity()
    gone = one.add(PROMPT, **SAMPLED, grammar=spec)
    one.abort(gone)
    one.run()
    assert one.results[gone].finish_reason == "abort" and not one.results[gone].token_ids
    assert one.results[waiting].finish_reason == "stop"


def test_a_grammar_that_is_none_fails_its_request_alone(engine: Callable[..., Engine]) -> None:
    one = engine()
    good = one.add(PROMPT)
    bad = one.add(PROMPT, **SAMPLED, grammar=_spec(regex="(a(?=b))"))
    one.run()
    assert one.results[good].finish_reason == "length"
    (extra,) = one.results[bad].extras
    assert (extra.finish_reason, extra.error) == ("error", GRAMMAR_ERROR)
    assert extra.message is not None and "look-around" in extra.message


def test_a_dead_end_fails_its_request_alone(engine: Callable[..., Engine]) -> None:
    """A grammar may lead where nothing follows; this one allows a character that no token has."""
    one = engine()
    good = one.add(PROMPT)
    never = GrammarSpec(backend="xgrammar", kind="ebnf", text='root ::= "a" never\nnever ::= never')
    bad = one.add(PROMPT, **SAMPLED, grammar=never)
    one.run()
    assert one.results[good].finish_reason == "length"
    assert one.results[bad].finish_reason == "error"
    assert len(one.results[bad].token_ids) <= 1


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({}, "abc", "stop"),
        ({"min_tokens": 50}, "abc", "stop"),
        ({"ignore_eos": True, "max_tokens": 12}, "abc", "length"),
        ({"max_tokens": 2}, "ab", "length"),
    ],
)
def test_ends(
    engine: Callable[..., Engine],
    tokenizer: Tokenizer,
    params: dict[str, Any],
    text: str,
    reason: str,
) -> None:
    grammar = _spec(grammar='root ::= "a" "b" "c"', backend="xgrammar")
    (result,) = _run(engine(), 1, grammar=grammar, **params)
    said = _text(tokenizer, result)
    assert result.finish_reason == reason
    assert said == text if params.get("max_tokens") != 2 else "abc".startswith(said)
    if params.get("ignore_eos"):
        assert len(result.token_ids) == 12


def test_an_abort_on_the_way(engine: Callable[..., Engine]) -> None:
    one = engine()
    ids = [one.add(PROMPT, **SAMPLED, seed=s, grammar=_spec(regex="[a-z]{800}")) for s in range(3)]
    while not one.results[ids[2]].token_ids:
        one.step()
    one.abort(ids[1])
    for _ in range(3):
        one.step()
    one.abort(ids[0])
    one.run()
    assert [one.results[i].finish_reason for i in ids] == ["abort", "abort", "length"]
    assert one.core.grammars is not None and not one.core.grammars._walks


def test_the_mask_is_filled_while_the_forward_runs(engine: Callable[..., Engine]) -> None:
    one = engine()
    log: list[str] = []
    core, executor = one.core, one.core.executor

    def note(owner: Any, name: str) -> None:
        method = getattr(owner, name)
        setattr(owner, name, lambda *args: (log.append(name), method(*args))[1])

    for owner, name in (
        (executor, "forward"), (core.scheduler, "commit"), (core.grammars, "fill"),
        (executor, "sample"),
    ):  # fmt: skip
        note(owner, name)
    try:
        _run(one, 1, grammar=_spec(regex="a{40}"))
    finally:
        for owner, name in ((executor, "forward"), (core.scheduler, "commit")):
            delattr(owner, name)
        for owner, name in ((core.grammars, "fill"), (executor, "sample")):
            delattr(owner, name)
    steps = " ".join(log)
    assert steps.startswith("forward fill sample forward commit fill sample forward commit fill")


def test_planted_bugs_are_noticed(
    engine: Callable[..., Engine], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine()
    with monkeypatch.context() as patch:  # the mask is not applied
        patch.setattr(grammar_module, "mask_logits", lambda logits, words: None)
        assert {r.finish_reason for r in _run(one, 3)} == {"error"}
    with monkeypatch.context() as patch:  # nor does the engine look at what was drawn
        patch.setattr(grammar_module, "mask_logits", lambda logits, words: None)
        patch.setattr(GrammarManager, "advance", lambda *args: [])
        with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
            assert any([_check(tokenizer, result) for result in _run(one, 3)])
    with monkeypatch.context() as patch:  # masks of the step before
        patch.setattr(GrammarManager, "advance", lambda *args: [])
        with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
            assert any([_check(tokenizer, result) for result in _run(one, 3)])
    assert any([_check(tokenizer, result) for result in _run(one, 6)])


def test_others_go_on_while_a_hostile_grammar_is_compiled(engine: Callable[..., Engine]) -> None:
    one = engine()
    _run(one, 1)
    hostile = {"enum": [f"{i}" + "x" * 20 for i in range(20_000)]}
    bad = one.add(PROMPT, **SAMPLED, grammar=_spec(hostile, "xgrammar"))
    good = one.add(PROMPT, max_tokens=150)
    began = time.monotonic()
    while one.results[good].finish_reason is None:
        one.step()
    assert one.results[bad].finish_reason is None, "the free request was not held up"
    one.run()
    took = time.monotonic() - began
    in_time(took, 7 * calibrate())  # of them 2.5 the grammar, the rest the start of its compiler
    errors = [extra.error for extra in one.results[bad].extras]
    assert errors == [GRAMMAR_ERROR] or (errors == [OverloadedError.code] and took > 2.5)


def test_offline(model: Path) -> None:
    with LLM(str(model), device="cpu", dtype="float32", max_model_len=128) as llm:
        asked = StructuredOutputsParams(choice=["left", "right"])
        free, bound = SamplingParams(max_tokens=4), SamplingParams(structured_outputs=asked, n=3)
        outputs = llm.generate(["go", "go"], [free, bound], use_tqdm=False)
        assert len(outputs[0].outputs[0].token_ids) == 4
        assert {c.text for c in outputs[1].outputs} <= {"left", "right"}
        never = StructuredOutputsParams(regex="(a(?=b))")
        with pytest.raises(RequestError, match="structured_outputs.*look-around"):
            llm.generate("go", SamplingParams(structured_outputs=never), use_tqdm=False)
        assert llm.generate("go", bound, use_tqdm=False)[0].finished


class Verdict(BaseModel):
    """What the SDK turns into a strict schema."""

    ok: bool
    kind: Literal["a", "b"]


def _hostile(index: int) -> dict[str, Any]:
    name = f"h{index}-"
    nested: Any = {"type": "string"}
    for _ in range(6 + index % 15):
        nested = {"oneOf": [{"type": "array", "items": nested}, {"type": "object"}]}
    schemas: list[dict[str, Any]] = [
        {"guided_json": {"enum": [f"{name}{i}" + "x" * 20 for i in range(20_000)]}},
        {"guided_json": {"properties": {f"{name}{i}": {"type": "null"} for i in range(10_000)}}},
        {"guided_json": nested},
        {"guided_regex": f"{name}(x{{1000}}){{1000}}"},
        {"guided_regex": "(" * 60_000 + ")" * 60_000},
        {"guided_grammar": f'root ::= "{name}" root root | root'},
    ]
    return schemas[index % len(schemas)]


def _check_refusal(answer: httpx.Response, index: int) -> None:
    """What refuses `_hostile(index)` is its own fault, or that there are many."""
    said = answer.json()["error"]["message"]
    own = {3: "it is too large", 4: "nested parentheses"}.get(index % 6)
    reasons = [reason for reason in (own, "compiling took more than 2 seconds") if reason]
    if answer.status_code == 503:
        reasons = ["too many grammars are being"]
    assert any(reason in said for reason in reasons), said


async def _storm(url: str) -> tuple[list[tuple[int, float]], list[float]]:
    """Status and seconds of 20 hostile requests at once; seconds between a free one's events."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def ask(hostile: int = 0, **fields: Any) -> tuple[int, float]:
            began = time.monotonic()
            body = {"prompt": "x", "max_tokens": 2} | fields
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 200:
                _check_refusal(answer, hostile)
            return answer.status_code, time.monotonic() - began

        for warm in ({"guided_choice": ["a"]}, {"guided_regex": "a"}):
            assert (await ask(**warm))[0] == 200
        gaps: list[float] = []

        async def stream() -> None:
            body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                last = time.monotonic()
                async for _ in answer.aiter_lines():
                    gaps.append(time.monotonic() - last)
                    last = time.monotonic()

        running = asyncio.create_task(stream())
        results = await asyncio.gather(*(ask(i, **_hostile(i)) for i in range(20)))
        assert (await ask(guided_choice=["b"]))[0] == 200
        await running
        return results, gaps


def test_over_http(model: Path) -> None:
    with Server(str(model), "--max-model-len", "512", "--device", "cpu") as server:
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        message: Any = [{"role": "user", "content": "go"}]
        name = sdk.models.list().data[0].id
        for seed in range(3):
            answer = sdk.chat.completions.parse(
                model=name, messages=message, response_format=Verdict, seed=seed,
                temperature=1.0, extra_body={"structured_outputs": {"json": {},
                                             "disable_any_whitespace": True}},
            )  # fmt: skip
            assert isinstance(answer.choices[0].message.parsed, Verdict)
        with pytest.raises(openai.BadRequestError, match="#/properties/a/uniqueItems"):
            schema = {"properties": {"a": {"uniqueItems": True}}}
            form: Any = {"name": "x", "schema": schema, "strict": True}
            sdk.chat.completions.create(
                model=name, messages=message, stream=True,
                response_format={"type": "json_schema", "json_schema": form},
            )  # fmt: skip
        results, gaps = asyncio.run(_storm(server.url))
        assert {status for status, _ in results} <= {200, 400, 503}
        assert any(status == 400 for status, _ in results), "some had their time"
        assert all(status != 200 for status, _ in results[0::6] + results[1::6])
        slower = calibrate()
        in_time(max(seconds for _, seconds in results), 6 * slower)  # 4 the grammar, 1 the schema
        in_time(max(gaps), 2 * slower)
        time.sleep(0.5)
        busy = [pid for pid in processes_of(server.process.pid) if _is_running(pid)]
        assert not busy, "somebody still compiles"


def _is_running(pid: int) -> bool:
    """Whether the process has used a core in the last half second."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(0.5)
    return ticks() - before > 20
