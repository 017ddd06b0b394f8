# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""POST /v1/chat/completions, whole."""

from typing import Any

import pytest

from llmserve.core.sampling_params import RepetitionDetection
from tests.helpers.api import CONTEXT, TOKENIZER, Api, open_api

PROMPT = "<|user|>hi</s><|assistant|>"


async def test_every_key_of_the_body_and_its_nulls() -> None:
    async with open_api() as api:
        body = (await api.chat()).json()
    assert body["id"].startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int) and body.pop("id")
    prompt, completion = len(TOKENIZER.encode(PROMPT)), len("Hello, world!") + 1
    assert body == {
        "object": "chat.completion",
        "model": "org/tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello, world!",
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": "llmserve-test-fp",
        "usage": {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
    }


async def test_fields_reach_the_engine() -> None:
    sent: dict[str, Any] = {
        "n": 1,
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "allowed_token_ids": [1, 2],
        "bad_words": ["bad"],
        "seed": 9,
        "stop": ["zz"],
        "stop_token_ids": [5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 8,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    async with open_api() as api:
        rest = {"logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2}
        answer = await api.chat(priority=3, cache_salt="salt", **sent, **rest)
        assert answer.status_code == 200, answer.text
        (request,) = api.engine.requests
        assert {name: getattr(request.params, name) for name in sent} == sent
        assert (request.params.logit_bias, request.params.logprobs) == ({5: 1.0}, 2)
        assert (request.priority, request.cache_salt) == (3, "salt")
        assert request.prompt_token_ids.tolist() == TOKENIZER.encode(PROMPT)


async def test_what_is_not_given_is_the_models_default() -> None:
    async with open_api() as api:
        api.state.engine().input_processor.generation_defaults = {"temperature": 0.25, "top_k": 3}
        await api.chat(top_k=4)
        params = api.engine.requests[0].params
        assert (params.temperature, params.top_k) == (0.25, 4)
        assert params.max_tokens == CONTEXT - len(TOKENIZER.encode(PROMPT))


async def test_the_newer_name_of_max_tokens_wins() -> None:
    async with open_api() as api:
        await api.chat(max_tokens=5, max_completion_tokens=3)
        assert api.engine.requests[0].params.max_tokens == 3


async def test_a_limit_that_does_not_fit_is_lowered_and_said() -> None:
    room = CONTEXT - len(TOKENIZER.encode(PROMPT))
    async with open_api() as api:
        for stream in (False, True):
            answer = await api.chat(max_tokens=CONTEXT, stream=stream)
            assert answer.headers["x-llmserve-max-tokens"] == str(room)
            assert "x-llmserve-max-tokens" not in (await api.chat(max_tokens=room)).headers
            assert "x-llmserve-max-tokens" not in (await api.chat()).headers
        assert {request.params.max_tokens for request in api.engine.requests} == {room}


async def test_ids_and_prompt_come_back_when_asked_for() -> None:
    async with open_api() as api:
        body = (await api.chat(return_token_ids=True, return_prompt_text=True, max_tokens=2)).json()
        ids = TOKENIZER.encode("He", add_special_tokens=False)
        assert body["choices"][0]["token_ids"] == ids
        assert body["prompt_token_ids"] == TOKENIZER.encode(PROMPT)
        assert body["prompt_text"] == PROMPT
        named = await api.chat(logprobs=True, max_tokens=1, return_tokens_as_token_ids=True)
        token = named.json()["choices"][0]["logprobs"]["content"][0]["token"]
        assert token == f"token_id:{ids[0]}"


async def test_prompt_logprobs() -> None:
    async with open_api() as api:
        body = (await api.chat(prompt_logprobs=1, max_tokens=1)).json()
    prompt = TOKENIZER.encode(PROMPT)
    assert len(body["prompt_logprobs"]) == len(prompt)
    assert body["prompt_logprobs"][0] is None
    for token, entry in zip(prompt[1:], body["prompt_logprobs"][1:], strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(-token / 100)
        assert len(entry) == 2


async def ask(api: Api, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    answer = await api.post("/v1/chat/completions", {"messages": messages} | fields)
    body: dict[str, Any] = answer.json()
    return body["choices"][0]["message"]  # type: ignore[no-any-return]


async def test_echo_and_role_of_a_continued_message() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I say: "}]
    go_on = {"add_generation_prompt": False, "continue_final_message": True}
    async with open_api() as api:
        assert (await ask(api, messages, echo=True, **go_on))["content"] == "I say: Hello, world!"
        assert (await ask(api, messages, **go_on))["content"] == "Hello, world!"
        last = await ask(api, messages[:1], add_generation_prompt=False, echo=True)
        assert last == last | {"role": "user", "content": "hiHello, world!"}
    async with open_api(response_role="bot") as api:
        assert (await ask(api, messages[:1]))["role"] == "bot"


async def test_n_answers_are_one_prompt() -> None:
    async with open_api() as api:
        body = (await api.chat(n=3, max_tokens=2, seed=1)).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["completion_tokens"] == 6
        assert body["usage"]["prompt_tokens"] == len(TOKENIZER.encode(PROMPT))
        assert len({request.params.seed for request in api.engine.requests}) == 3


async def test_stop_strings_end_the_answer_and_are_named() -> None:
    async with open_api() as api:
        choice = (await api.chat(stop="wor")).json()["choices"][0]
    assert choice["message"]["content"] == "Hello, "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wor")


async def test_beam_search() -> None:
    async with open_api() as api:
        body = (await api.chat(use_beam_search=True, n=2, max_tokens=2, logprobs=True)).json()
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert texts[0] == "II" and len(texts) == 2  # the scripted engine's likeliest after any
        assert len(body["choices"][0]["logprobs"]["content"]) == 2
        refused = await api.chat(use_beam_search=True, stream=True)
        assert refused.json()["error"]["param"] == "stream"


async def test_truncation_of_the_rendered_prompt() -> None:
    async with open_api() as api:
        body = (await api.chat("x" * 500, truncate_prompt_tokens=20, return_token_ids=True)).json()
        assert TOKENIZER.decode(body["prompt_token_ids"]).endswith("x<|assistant|>")
        assert body["usage"]["prompt_tokens"] == 20
        assert (await api.chat("x" * 500)).json()["error"]["code"] == "context_length_exceeded"


DOCUMENTS = "{% for d in documents %}[{{ d.title }}]{% endfor %}{{ messages[0].content }}"


async def test_documents_go_into_a_template_that_reads_them() -> None:
    fields: dict[str, Any] = {"documents": [{"title": "A"}, {"title": "B"}]}
    fields["return_prompt_text"] = True
    async with open_api(template=DOCUMENTS) as api:
        answer = await api.chat(**fields)
        assert answer.json()["prompt_text"] == "[A][B]hi"
        assert "x-llmserve-ignored" not in answer.headers
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        ids = (await api.post("/tokenize", body)).json()["tokens"]
        assert TOKENIZER.decode(ids) == "[A][B]hi"
    async with open_api() as api:
        answer = await api.chat(**fields)
        assert answer.headers["x-llmserve-ignored"] == "documents"


async def test_a_clients_template_where_it_is_trusted() -> None:
    template = "<{{ messages[0].content }}>{% if enable_thinking %}!{% endif %}"
    fields = {"chat_template": template, "return_prompt_text": True, "reasoning_effort": "low"}
    async with open_api(trust_request_chat_template=True) as api:
        answer = await api.chat(**fields)
        assert answer.json()["prompt_text"] == "<hi>!", "its variables count, not the model's"
        body = {"messages": [{"role": "user", "content": "hi"}], "chat_template": template}
        assert (await api.post("/tokenize", body)).json()["count"] == 4
        for wrong in ("{% if %}", "{{ messages[9].x.y }}"):
            answer = await api.chat(chat_template=wrong)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] in ("chat_template", "messages")
    async with open_api() as api:
        answer = await api.post("/tokenize", body)
        assert answer.json()["error"]["param"] == "chat_template"
        assert "--trust-request-chat-template" in answer.json()["error"]["message"]


async def test_fields_about_the_output_reach_the_engine() -> None:
    async with open_api() as api:
        answer = await api.chat(
            logprobs=True,
            logprob_token_ids=[3, 5],
            repetition_detection={"max_pattern_size": 4, "min_count": 3},
        )
        assert answer.status_code == 200, answer.text
        params = api.engine.requests[-1].params
        assert params.logprob_token_ids == [3, 5]
        assert params.repetition_detection == RepetitionDetection(
            max_pattern_size=4, min_pattern_size=1, min_count=3
        )
        await api.chat(repetition_detection={})
        assert api.engine.requests[-1].params.repetition_detection is None
        api.engine.answer = lambda request: "hahahaha and so on"
        answer = await api.chat(repetition_detection={"max_pattern_size": 4, "min_count": 3})
        [choice] = answer.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("hahaha", "repetition")
        beams = await api.chat(logprobs=True, logprob_token_ids=[3], use_beam_search=True)
        assert beams.json()["error"]["param"] == "logprob_token_ids"


async def test_own_logits_processors_get_their_arguments() -> None:
    async with open_api() as api:
        assert api.state.llm is not None
        api.state.llm.input_processor.takes_extra_args = True
        for send in (api.chat, api.complete):
            answer = await send(vllm_xargs={"only_even": 1, "names": ["a", 2.5]})
            assert answer.status_code == 200, answer.text
            assert api.engine.requests[-1].params.extra_args == {
                "only_even": 1,
                "names": ["a", 2.5],
            }
        wrong = await api.chat(vllm_xargs={"a": {"b": 1}})
        assert wrong.status_code == 400 and wrong.json()["error"]["param"].startswith(
            "vllm_xargs.a"
        )


async def test_beams_name_the_field_that_they_cannot_honour() -> None:
    async with open_api(reasoning_parser="think") as api:
        for name, value in (
            ("thinking_token_budget", 5),
            ("repetition_detection", {"max_pattern_size": 2}),
            ("guided_regex", "a"),
        ):
            answer = await api.chat(use_beam_search=True, n=2, temperature=0, **{name: value})
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert name in error["message"]
