# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve serve` with three models, asked through OpenAI's own client.

After each test no request is left, no KV block is lost and all processes live; after the last one
they are gone (tests/helpers/server.py).
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from llmserve.config import demo
from tests.helpers.server import Server

CONTEXT = 256
TEXT = "The quick brown fox jumps over the lazy dog, while the server answers the client in tokens."
_FRESH = itertools.count()


def fresh() -> str:
    """A prompt that no cache has."""
    return f"{next(_FRESH)} is the number of the day. {TEXT}"


@pytest.fixture(scope="module", params=["qwen3 folder", "gemma3 gguf", "demo"])
def running(request: pytest.FixtureRequest, qwen3: Path, gemma3: Path) -> Iterator[Server]:
    demo.demo_model()
    model = {"qwen3 folder": [str(qwen3)], "gemma3 gguf": [str(gemma3)], "demo": []}[request.param]
    flags = ["--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "64MiB"]
    with Server(*model, *flags, "--dtype", "float32", "--cpu-threads", "1") as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.check_idle()


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_names(client: openai.OpenAI, model: str, qwen3: Path, gemma3: Path) -> None:
    assert model in (str(qwen3), str(gemma3), demo.NAME)
    card = client.models.retrieve(model)
    assert (card.id, card.model_dump()["max_model_len"]) == (model, CONTEXT)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gone", messages=[{"role": "user", "content": "hi"}])


SAMPLED = {"temperature": 1.0, "seed": 5}
CHATS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    SAMPLED | {"top_p": 0.95, "presence_penalty": 0.5},
    SAMPLED | {"logprobs": True, "top_logprobs": 3},
    SAMPLED | {"n": 3},
]


@pytest.mark.parametrize("fields", CHATS, ids=["greedy", "sampled", "logprobs", "n"])
def test_streamed_chat_equals_whole(
    client: openai.OpenAI, model: str, fields: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {
        "model": model, "max_tokens": 24,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}],
    } | fields  # fmt: skip
    whole = client.chat.completions.create(**asked)
    count = fields.get("n", 1)
    texts, logprobs = [""] * count, [[] for _ in range(count)]
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs and choice.logprobs.content:
                logprobs[choice.index] += choice.logprobs.content
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    assert [choice.index for choice in whole.choices] == list(range(count))
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert len(set(texts)) == count
    if fields.get("logprobs"):
        content = whole.choices[0].logprobs.content
        assert [token.token for token in logprobs[0]] == [token.token for token in content]
        assert len(content) == whole.usage.completion_tokens
        assert all(len(token.top_logprobs) == 3 for token in content)


COMPLETIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    SAMPLED | {"n": 2, "echo": True},
    SAMPLED | {"logprobs": 2},
]


@pytest.mark.parametrize("fields", COMPLETIONS, ids=["greedy", "n and echo", "logprobs"])
def test_streamed_completion_equals_whole(
    client: openai.OpenAI, model: str, fields: dict[str, Any]
) -> None:
    prompts = [TEXT, "Once upon a time"]
    asked: dict[str, Any] = {"model": model, "prompt": prompts, "max_tokens": 16} | fields
    whole = client.completions.create(**asked)
    texts = [""] * len(whole.choices)
    tokens: list[list[str]] = [[] for _ in texts]
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
    assert len(texts) == 2 * fields.get("n", 1)
    assert texts == [choice.text for choice in whole.choices]
    if fields.get("echo"):
        assert all(
            text.startswith(prompts[index // 2]) and text != prompts[index // 2]
            for index, text in enumerate(texts)
        )
    if "logprobs" in fields:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_a_seed_repeats_and_another_does_not(server: Server) -> None:
    def answer(seed: int) -> str:
        asked = {"prompt": TEXT, "max_tokens": 24, "temperature": 1, "seed": seed}
        return server.post("/v1/completions", **asked)["choices"][0]["text"]

    assert answer(7) == answer(7) != answer(8)


def test_stop_string(server: Server) -> None:
    asked = {"prompt": TEXT, "max_tokens": 40, "ignore_eos": True} | SAMPLED
    text = server.post("/v1/completions", **asked)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    (choice,) = server.post("/v1/completions", stop=stop, **asked)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_scored_as_it_was_generated(server: Server) -> None:
    """Token by token through the cache, and all at once as a prompt."""
    asked = {"prompt": fresh(), "max_tokens": 20, "logprobs": 1, "return_token_ids": True}
    answer = server.post("/v1/completions", temperature=0, ignore_eos=True, **asked)
    choice = answer["choices"][0]
    ids = choice["prompt_token_ids"] + choice["token_ids"]
    scored = server.post("/v1/completions", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    generated, again = choice["logprobs"], scored["choices"][0]["logprobs"]
    assert len(again["token_logprobs"]) == len(ids) and again["token_logprobs"][0] is None
    tail = again["token_logprobs"][-20:]
    assert tail == pytest.approx(generated["token_logprobs"], abs=1e-3)
    for value, best in zip(tail, again["top_logprobs"][-20:], strict=True):
        assert value == pytest.approx(max(best.values()), abs=1e-3)


def test_usage_and_cached_tokens(server: Server) -> None:
    before = server.metrics()
    asked = {"prompt": fresh(), "max_tokens": 8, "ignore_eos": True}
    usages = [server.post("/v1/completions", **asked)["usage"] for _ in range(2)]
    salted = server.post("/v1/completions", cache_salt="own", **asked)["usage"]
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in (*usages, salted)]
    prompt = usages[0]["prompt_tokens"]
    assert cached == [0, (prompt - 1) // 16 * 16, 0]
    for usage in usages:
        assert usage["completion_tokens"] == 8
        assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    after = server.metrics()
    rise = {name: after[name] - before.get(name, 0.0) for name in after}
    assert rise["vllm:prompt_tokens_total"] == 3 * prompt
    assert rise["vllm:generation_tokens_total"] == 24
    assert rise["vllm:prefix_cache_hits_total"] == cached[1]
    assert rise["vllm:request_success_total{length}"] == 3
    assert rise["vllm:time_to_first_token_seconds_count"] == 3
    assert rise["llmserve:kv_blocks"] == 0


def test_tokenize_round_trip(server: Server) -> None:
    text = "Zwölf 🦙 jumps,\n\tover 12345"
    plain = server.post("/tokenize", prompt=text, add_special_tokens=False)
    assert server.post("/detokenize", tokens=plain["tokens"])["prompt"] == text
    assert plain["count"] == len(plain["tokens"]) and plain["max_model_len"] == CONTEXT
    messages = [{"role": "user", "content": text}]
    rendered = server.post("/tokenize", messages=messages)
    answer = server.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == rendered["count"] > plain["count"]


def test_many_at_once_answer_as_each_alone(server: Server) -> None:
    bodies = [
        {"prompt": f"{n} {TEXT[n:]}", "max_tokens": 12, "temperature": 0} for n in range(0, 80, 10)
    ]

    def answer(body: dict[str, Any]) -> str:
        return server.post("/v1/completions", **body)["choices"][0]["text"]

    alone = [answer(body) for body in bodies]
    steps = server.metrics()["llmserve:engine_steps_total"]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, bodies)) == alone
    assert server.metrics()["llmserve:engine_steps_total"] - steps < 8 * 12
    assert len(set(alone)) > 1
