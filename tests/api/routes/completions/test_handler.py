# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /v1/completions, whole."""

import itertools
import re

import pytest

from llmserve.core import sampling_params
from tests.helpers.api import TOKENIZER, events, open_api


async def test_every_key_of_the_body_and_its_nulls() -> None:
    async with open_api() as api:
        body = (await api.complete("hi", max_tokens=2)).json()
    assert body.pop("id").startswith("cmpl-") and body.pop("created")
    assert body == {
        "object": "text_completion",
        "model": "org/tiny",
        "choices": [
            {
                "index": 0,
                "text": "He",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "llmserve-test-fp",
        "usage": {
            "prompt_tokens": 2,
            "total_tokens": 4,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (TOKENIZER.encode("ab"), ["ab"]),
        ([TOKENIZER.encode("ab"), TOKENIZER.encode("c")], ["ab", "c"]),
        (["ab", TOKENIZER.encode("c")], ["ab", "c"]),
    ],
)
async def test_prompt_forms(prompt: object, texts: list[str]) -> None:
    async with open_api() as api:
        api.engine.answer = lambda request: "!" * len(request.prompt_token_ids)
        body = (await api.complete(prompt, n=2, echo=True, return_token_ids=True)).json()
        expected = [text + "!" * len(text) for text in texts for _ in range(2)]
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
        ids = [TOKENIZER.encode(text) for text in texts for _ in range(2)]
        assert [choice["prompt_token_ids"] for choice in body["choices"]] == ids
        assert body["usage"]["prompt_tokens"] == sum(map(len, texts))


async def test_1024_prompts() -> None:
    async with open_api() as api:
        body = (await api.complete(["x"] * 1024, max_tokens=1)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(1024))


async def test_sixteen_tokens_unless_told_otherwise() -> None:
    async with open_api() as api:
        for fields in ({}, {"max_tokens": None}):
            await api.post("/v1/completions", {"prompt": "hi"} | fields)
            assert api.engine.requests[-1].params.max_tokens == 16
        answer = await api.post("/v1/completions", {"prompt": "x" * 250})
        assert api.engine.requests[-1].params.max_tokens == 6
        assert "x-llmserve-max-tokens" not in answer.headers
        answer = await api.complete(["x", "x" * 250], max_tokens=100)
        assert answer.headers["x-llmserve-max-tokens"] == "6"


async def test_scoring_without_generating() -> None:
    async with open_api() as api:
        body = (await api.complete("abc", echo=True, max_tokens=0, logprobs=2)).json()
        (choice,) = body["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1] == pytest.approx(
            -TOKENIZER.encode("b")[0] / 100
        )
        assert body["usage"]["completion_tokens"] == 0
        assert choice["prompt_logprobs"] is None
        refused = await api.complete("abc", max_tokens=0)
        assert refused.json()["error"]["param"] == "max_tokens"


async def test_prompt_logprobs_by_themselves_and_with_echo() -> None:
    async with open_api() as api:
        for asked, echo, wide in ((3, False, 3), (1, True, 2), (3, True, 3)):
            body = await api.complete("ab", prompt_logprobs=asked, echo=echo, logprobs=2)
            assert api.engine.requests[-1].params.prompt_logprobs == wide
            entries = body.json()["choices"][0]["prompt_logprobs"]
            assert entries[0] is None and len(entries) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_that_are_scored_too_often(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Each choice has them: 128 times 30,000 tokens were 11 GB in 84 s of the event loop."""
    monkeypatch.setattr(sampling_params, "MAX_LOGPROBS", 24)
    fields = {"echo": True, "logprobs": 1, "stream": stream}
    async with open_api() as api:
        assert (await api.complete(["ab", "abcd"], n=2, **fields)).status_code == 200
        api.engine.requests.clear()
        for prompts, n in ((["ab", "abcd"], 3), (["ab", "abcd", "a"], 2)):
            error = (await api.complete(prompts, n=n, **fields)).json()["error"]
            assert error["code"] == "integer_above_max_value"
            assert re.search("prompt_logprobs: 2 .* at most 24", error["message"])
        assert not api.engine.requests


async def test_one_bad_prompt_refuses_all_before_anything_runs() -> None:
    async with open_api() as api:
        answer = await api.complete(["a", "b", "x" * 300])
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert not api.engine.requests


async def test_best_of_shows_the_likeliest_by_the_mean_of_their_tokens() -> None:
    """Token t has log-probability -t / 100, so "a" is likelier than "b"."""
    async with open_api() as api:
        texts = itertools.cycle(["cc", "a", "bbbb", "f", "d", "e"])
        api.engine.answer = lambda request: next(texts)
        body = (await api.complete(["x", "y"], n=2, best_of=3, max_tokens=1)).json()
        assert [choice["text"] for choice in body["choices"]] == ["a", "b", "d", "e"]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert {choice["logprobs"] for choice in body["choices"]} == {None}
        assert body["usage"]["completion_tokens"] == 6
        for fields in ({"stream": True}, {"use_beam_search": True}, {"temperature": 0}):
            error = (await api.complete(best_of=2, **fields)).json()["error"]
            assert (error["param"], error["code"]) == ("best_of", "invalid_value")
        error = (await api.complete(best_of=1, n=2)).json()["error"]
        assert "at least n=2, got 1" in error["message"]
        assert (await api.complete(best_of=2, n=2, stream=True)).status_code == 200


async def test_beam_search() -> None:
    """After any token t its likeliest are t + 1, t + 2 .. with log-probabilities -1, -2 .."""
    async with open_api() as api:
        asked = {"use_beam_search": True, "n": 2, "max_tokens": 3, "temperature": 0}
        answer = await api.complete(["a", "b"], logprobs=1, return_token_ids=True, **asked)
        body = answer.json()
        first, second, *_ = body["choices"]
        step = TOKENIZER.encode("H")[0] + 1
        assert first["token_ids"] == [step] * 3 and first["finish_reason"] == "length"
        assert second["token_ids"] != first["token_ids"]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert first["logprobs"]["token_logprobs"] == [-1.0] * 3
        assert body["usage"]["completion_tokens"] == 12
        assert answer.headers["x-llmserve-ignored"] == "temperature"
        assert len(api.engine.requests) == 2 * (1 + 2 + 2)
        for fields, param in (
            ({"stream": True}, "stream"),
            ({"echo": True, "logprobs": 1}, "logprobs"),
            ({"stop": ["x"]}, "stop"),
            ({"logit_bias": {"1": 1}}, "logit_bias"),
            ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ):
            refused = await api.complete("a", **(asked | fields))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        bound = await api.complete(thinking_token_budget=3, structured_outputs={"regex": "a"})
        assert bound.headers["x-llmserve-ignored"] == "thinking_token_budget"
        ignored = await api.complete("a", length_penalty=2.0, early_stopping=True)
        assert ignored.headers["x-llmserve-ignored"] == "length_penalty, early_stopping"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(3)),
        ({"truncate_prompt_tokens": -1}, slice(-206, None)),  # 256 less the 50 new ones
        ({"truncate_prompt_tokens": -1, "max_tokens": 256}, slice(-1, None)),
        ({"truncate_prompt_tokens": 256, "max_tokens": 0}, slice(-256, None)),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
async def test_truncation(fields: dict[str, object], kept: slice, as_text: bool) -> None:
    text = "".join(map(chr, range(32, 122))) * 4
    ids = TOKENIZER.encode(text)[kept]
    async with open_api() as api:
        asked = text if as_text else TOKENIZER.encode(text)
        answer = await api.complete(asked, echo=True, return_token_ids=True, **fields)
        (choice,) = answer.json()["choices"]
        assert choice["prompt_token_ids"] == ids
        assert choice["text"].startswith(text[kept])
        short = await api.complete("ab", truncate_prompt_tokens=100, return_token_ids=True)
        assert short.json()["usage"]["prompt_tokens"] == 2
        named = await api.complete("ab", truncation_side="right")
        assert named.headers["x-llmserve-ignored"] == "truncation_side"


async def test_reasoning_is_counted_and_stays_in_the_text() -> None:
    async with open_api(reasoning_parser="think") as api:
        api.engine.answer = lambda request: "<think>hmm</think>So."
        for n in (1, 2):
            whole = (await api.complete(n=n)).json()
            assert [choice["text"] for choice in whole["choices"]] == ["<think>hmm</think>So."] * n
            counted = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
            assert counted == n * (len("hmm</think>") - 1)  # a token a byte: all but the last one
        options = {"stream": True, "stream_options": {"include_usage": True}}
        usage = events((await api.complete(n=2, **options)).text)[-2]["usage"]
        assert usage["completion_tokens_details"] == whole["usage"]["completion_tokens_details"]
        api.engine.answer = lambda request: "hmm</think>So."
        opened = (await api.complete("x <think>")).json()["usage"]
        assert opened["completion_tokens_details"]["reasoning_tokens"] == counted / 2
        none = (await api.complete("x")).json()["usage"]
        assert none["completion_tokens_details"] is None


async def test_a_priority_that_orders_nothing_is_named() -> None:
    async with open_api() as api:
        assert (await api.complete(priority=3)).headers["x-llmserve-ignored"] == "priority"
        assert (await api.chat(priority=3)).headers["x-llmserve-ignored"] == "priority"
        assert "x-llmserve-ignored" not in (await api.chat(priority=0)).headers
        assert api.state.llm is not None
        api.state.llm.model.has_priorities = True
        assert "x-llmserve-ignored" not in (await api.chat(priority=3)).headers
