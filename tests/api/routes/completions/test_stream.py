# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Completion chunks."""

from typing import Any

from tests.helpers.api import TOKENIZER, Api, events, open_api


async def chunks(api: Api, prompt: Any, **fields: Any) -> list[Any]:
    answer = await api.complete(prompt, stream=True, **fields)
    *found, done = events(answer.text)
    assert done == "[DONE]"
    return found


async def test_choices_of_several_prompts_join_to_the_whole_answer() -> None:
    async with open_api() as api:
        api.engine.answer = lambda request: "x" * len(request.prompt_token_ids) + "é"
        api.engine.one_by_one = True
        fields: dict[str, Any] = {"n": 2, "echo": True, "logprobs": 1, "return_token_ids": True}
        whole = (await api.complete(["a", "bcd"], **fields)).json()
        found = await chunks(api, ["a", "bcd"], stream_options={"include_usage": True}, **fields)
    *found, last = found
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in found if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            joined = [v for part in own if part["logprobs"] for v in part["logprobs"][name]]
            assert joined == values, name
        assert [t for part in own for t in part["token_ids"]] == choice["token_ids"]
        assert [p["finish_reason"] for p in own if p["finish_reason"]] == ["stop"]


async def test_a_chunk_and_its_finish() -> None:
    async with open_api() as api:
        api.engine.answer = lambda request: "a"
        api.engine.one_by_one = True
        text, finish = await chunks(api, "hi")
    assert text["object"] == "text_completion"
    assert text["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]
    assert finish["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert finish["system_fingerprint"] == "llmserve-test-fp"


async def test_scoring_streams_one_chunk() -> None:
    async with open_api() as api:
        (only,) = await chunks(api, "abc", echo=True, max_tokens=0, logprobs=1)
    (choice,) = only["choices"]
    assert choice["text"] == "abc" and choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["finish_reason"] == "length"


async def test_prompt_ids_come_once() -> None:
    async with open_api() as api:
        api.engine.one_by_one = True
        first, *rest = await chunks(api, "hi", return_token_ids=True)
    assert first["prompt_token_ids"] == TOKENIZER.encode("hi")
    assert all("prompt_token_ids" not in chunk for chunk in rest)
