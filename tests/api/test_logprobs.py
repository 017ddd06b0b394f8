# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The three shapes of log-probabilities."""

import threading
import time
import weakref
from functools import partial
from typing import Any

import pytest

from llmserve.api import generation
from llmserve.api.logprobs import LegacyLogprobs, TokenNames, join_legacy
from llmserve.core.outputs import Logprob
from tests.helpers.api import TOKENIZER, events, open_api

A, B, C = TOKENIZER.encode("abc", add_special_tokens=False)
NAMES = TokenNames(TOKENIZER, False)
ENTRIES = [([A, B, A], [-1.0, -0.5, -1.0], 2), ([C, C, B], [-0.1, -0.1, float("-inf")], 1)]


def test_chat() -> None:
    first, second = NAMES.chat(ENTRIES)["content"]
    assert first == {
        "token": "a",
        "logprob": -1.0,
        "bytes": [97],
        "top_logprobs": [
            {"token": "b", "logprob": -0.5, "bytes": [98]},
            {"token": "a", "logprob": -1.0, "bytes": [97]},
        ],
    }
    assert second["top_logprobs"][1]["logprob"] == -9999.0


def test_a_token_that_is_named_and_likely_stands_once() -> None:
    [entry] = NAMES.chat([([A, B, C, B, A], [-1.0, -0.5, -2.0, -0.5, -1.0], 2)])["content"]
    assert [other["token"] for other in entry["top_logprobs"]] == ["b", "c", "a"]


def test_bytes_of_half_a_character_and_of_special_tokens() -> None:
    half = TOKENIZER.encode("é", add_special_tokens=False)[0]
    assert (NAMES.name(half), NAMES.bytes(half)) == ("\ufffd", [0xC3])
    assert (NAMES.name(257), NAMES.bytes(257)) == ("</s>", list(b"</s>"))


def test_names_as_ids() -> None:
    for names in (TokenNames(TOKENIZER, True), TokenNames(None, False)):
        entry = names.chat(ENTRIES[:1])["content"][0]
        assert entry["token"] == f"token_id:{A}"
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_prompt() -> None:
    entries = [None, {B: Logprob(-2.0, 3), C: Logprob(-0.1, 1)}]
    assert NAMES.prompt(entries) == [
        None,
        {
            str(B): {"logprob": -2.0, "rank": 3, "decoded_token": "b"},
            str(C): {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
        },
    ]


def test_legacy_offsets_run_on_from_chunk_to_chunk() -> None:
    whole = LegacyLogprobs(NAMES).completion(ENTRIES)
    assert whole == {
        "text_offset": [0, 1],
        "token_logprobs": [-1.0, -0.1],
        "tokens": ["a", "c"],
        "top_logprobs": [{"b": -0.5, "a": -1.0}, {"c": -0.1, "b": -9999.0}],
    }
    chunked = LegacyLogprobs(NAMES)
    parts = [chunked.completion([entry]) for entry in ENTRIES]
    assert join_legacy(*parts) == whole


def test_legacy_prompt() -> None:
    legacy = LegacyLogprobs(NAMES)
    prompt = legacy.prompt([A, B], [None, {B: Logprob(-2.0, 1)}])
    assert prompt["token_logprobs"] == [None, -2.0]
    assert prompt["top_logprobs"] == [None, {"b": -2.0}]
    assert legacy.completion(ENTRIES[:1])["text_offset"] == [2]
    assert LegacyLogprobs(NAMES).prompt([A], None)["token_logprobs"] == [None]


def test_legacy_offsets_count_characters() -> None:
    entries = [([257], [-1.0], 1), ([A], [-1.0], 1)]
    assert LegacyLogprobs(NAMES).completion(entries)["text_offset"] == [0, len("</s>")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat", "complete"])
@pytest.mark.parametrize("many", [False, True])
async def test_many_are_written_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, many: bool, path: str, stream: bool
) -> None:
    """A stream's echo of 30,000 tokens held it up for a second, 16 of them for ten; and with it all
    other streams."""
    threads: set[threading.Thread] = set()
    write = TokenNames.name

    def name(self: TokenNames, token: int) -> str:
        threads.add(threading.current_thread())
        return write(self, token)

    monkeypatch.setattr(TokenNames, "name", name)
    echo = {"echo": True, "logprobs": 20} if path == "complete" else {"logprobs": True}
    async with open_api() as api:
        api.engine.answer = lambda request: "x" * 40
        ask = api.complete if path == "complete" else api.chat
        few = {"top_logprobs": 20} if path == "chat" else {}
        fields = echo | few if many else {"logprobs": 1 if path == "complete" else True}
        assert (await ask("ab", stream=stream, **fields)).status_code == 200
    assert len(threads) == 1 and (threading.current_thread() in threads) != many


async def test_a_stream_goes_on_while_its_echo_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile is not left unread by its client."""
    write = LegacyLogprobs.prompt

    def prompt(self: LegacyLogprobs, *arguments: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return write(self, *arguments)

    monkeypatch.setattr(LegacyLogprobs, "prompt", prompt)
    async with open_api() as api:
        api.engine.answer, api.engine.delay = lambda request: "x" * 40, 2e-3
        fields = {"n": 8, "echo": True, "logprobs": 20, "stream": True}
        found = events((await api.complete("a" * 200, **fields)).text)
    assert found[-1] == "[DONE]"


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_a_whole_answer_has_not_too_many(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The largest that there could be had 88 million, which are 5 GB of JSON and 6 GB before it."""
    monkeypatch.setattr(generation, "MAX_LOGPROBS", 40)
    fields: dict[str, Any] = {"logprobs": 4} if path == "complete" else {"top_logprobs": 4}
    async with open_api() as api:
        api.engine.answer, api.engine.delay = lambda request: "x" * 7, 1e-3
        api.engine.one_by_one = True
        ask = partial(api.chat if path == "chat" else api.complete, **{"logprobs": True} | fields)
        assert (await ask(max_tokens=4, n=2)).status_code == 200
        refused = await ask(n=2)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "logprobs")
        assert "at most 40" in error["message"]
        assert len(api.engine.aborted) == 2
        assert events((await ask(n=2, stream=True)).text)[-1] == "[DONE]"


@pytest.mark.parametrize("path", ["chat", "complete"])
async def test_choices_are_written_one_by_one(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Those of 128 were 1.3 GB of objects, and held up other threads for 1.2 s when encoded."""

    class Body(dict[str, Any]):
        """May be looked at by weakref."""

    bodies: list[weakref.ref[Body]] = []
    alive: list[int] = []
    kind, method = (TokenNames, "chat") if path == "chat" else (LegacyLogprobs, "completion")
    write = getattr(kind, method)

    def kept(self: Any, entries: Any) -> Body:
        alive.append(sum(body() is not None for body in bodies))
        body = Body(write(self, entries))
        bodies.append(weakref.ref(body))
        return body

    monkeypatch.setattr(kind, method, kept)
    fields = {"logprobs": True} if path == "chat" else {"logprobs": 1}
    async with open_api() as api:
        answer = await (api.chat if path == "chat" else api.complete)(n=8, **fields)
    assert len(answer.json()["choices"]) == len(alive) == 8
    assert max(alive) == 1
