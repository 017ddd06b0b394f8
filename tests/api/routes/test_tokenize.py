# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /tokenize and /detokenize."""

from typing import Any

import pytest

from tests.helpers.api import CONTEXT, TOKENIZER, open_api


@pytest.mark.parametrize("text", ["plain", "Zwölf 🦙 中文", "a\n\tb", " lead", "</s>"])
async def test_there_and_back(text: str) -> None:
    async with open_api() as api:
        made = (await api.post("/tokenize", {"prompt": text, "return_token_strs": True})).json()
        assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
        assert made["max_model_len"] == CONTEXT
        assert made["tokens"] == TOKENIZER.encode(text)
        back = await api.post("/detokenize", {"tokens": made["tokens"]})
        assert back.json() == {"prompt": text}


async def test_messages_give_the_ids_of_the_same_chat_request() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    async with open_api() as api:
        for fields in (
            {},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            made = (await api.post("/tokenize", {"messages": messages} | fields)).json()
            body = {"messages": messages, "return_token_ids": True} | fields
            answer = (await api.post("/v1/chat/completions", body)).json()
            assert made["tokens"] == answer["prompt_token_ids"]
            assert made["token_strs"] is None


async def test_ids_outside_the_vocabulary_give_no_text() -> None:
    async with open_api() as api:
        known = TOKENIZER.encode("ab")
        answer = await api.post("/detokenize", {"tokens": [known[0], 10**12, 262, known[1]]})
        assert answer.json() == {"prompt": "ab"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": [{}]}, "messages[0].role"),
        ("/tokenize", {"messages": [], "model": "gone"}, "model"),
        ("/tokenize", {"prompt": "x" * 2000}, "prompt"),
        ("/tokenize", {"messages": [], "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": [], "tools": [1]}, "tools[0]"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**63]}, "tokens[0]"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: Any, param: str) -> None:
    async with open_api() as api:
        answer = await api.post(path, body)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param


async def test_tools_stand_in_the_prompt_as_in_a_chat_request() -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "user", "content": "hi"}]
    async with open_api(template=template) as api:
        await api.chat("hi", tools=tools)
        body = {"messages": messages, "tools": tools}
        ids = (await api.post("/tokenize", body)).json()["tokens"]
        assert ids == api.engine.requests[0].prompt_token_ids.tolist() == TOKENIZER.encode("fhi")
        assert (await api.post("/tokenize", body | {"tools": [1]})).status_code == 400
