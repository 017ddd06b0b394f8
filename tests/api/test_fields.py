# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every field of both routes, out of range and of the wrong type: one 400 that names it."""

from typing import Any

import pytest

from llmserve.api import fields
from llmserve.api.chat_messages import ROLES
from llmserve.api.fields import UNSUPPORTED, RequestBody, TokenLimit
from llmserve.api.routes.chat.schema import ChatBody
from llmserve.api.routes.completions.schema import CompletionBody
from llmserve.core.sampling_params import RepetitionDetection
from llmserve.errors import RequestError
from tests.helpers.api import MODEL, open_api

TYPE, VALUE = "invalid_type", "invalid_value"
LOW, HIGH = "integer_below_min_value", "integer_above_max_value"
LOWER, HIGHER = "decimal_below_min_value", "decimal_above_max_value"
LONG, SHORT = "array_above_max_length", "array_below_min_length"

FLAGS = [
    "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "stream", "echo", "return_token_ids",
    "return_tokens_as_token_ids", "add_special_tokens", "use_beam_search", "early_stopping",
]  # fmt: skip
SHAPES = [  # of the answer; more in test_structured.py
    "response_format", "structured_outputs", "guided_regex", "guided_choice", "guided_grammar",
    "guided_json_object", "structural_tag", "regex", "ebnf", "grammar",
]  # fmt: skip
SHARED: list[tuple[str, Any, str | None, str | None]] = [
    ("model", 7, TYPE, None),
    ("model", "gone", "model_not_found", None),
    ("max_tokens", "5", TYPE, None),
    ("max_tokens", 1.5, TYPE, None),
    ("max_tokens", 0, LOW, None),
    ("max_tokens", -1, LOW, None),
    ("max_tokens", 257, HIGH, None),
    ("max_tokens", 2**70, HIGH, None),
    ("n", "1", TYPE, None),
    ("n", True, TYPE, None),
    ("n", 0, LOW, None),
    ("n", 129, HIGH, None),
    ("temperature", "hot", TYPE, None),
    ("temperature", True, TYPE, None),
    ("temperature", -0.1, LOWER, None),
    ("temperature", 2.1, HIGHER, None),
    ("top_p", [], TYPE, None),
    ("top_p", 0, LOWER, None),
    ("top_p", 1.1, HIGHER, None),
    ("top_k", 1.5, TYPE, None),
    ("top_k", -2, LOW, None),
    ("top_k", 2**63, HIGH, None),
    ("min_p", {}, TYPE, None),
    ("min_p", -0.1, LOWER, None),
    ("min_p", 1.1, HIGHER, None),
    ("presence_penalty", "x", TYPE, None),
    ("presence_penalty", -2.1, LOWER, None),
    ("presence_penalty", 2.1, HIGHER, None),
    ("frequency_penalty", "x", TYPE, None),
    ("frequency_penalty", -2.1, LOWER, None),
    ("frequency_penalty", 2.1, HIGHER, None),
    ("repetition_penalty", "x", TYPE, None),
    ("repetition_penalty", 0, LOWER, None),
    ("repetition_penalty", 1e9, HIGHER, None),
    ("logit_bias", [], TYPE, None),
    ("logit_bias", {"x": 1}, VALUE, None),
    ("logit_bias", {"1": "x"}, TYPE, None),
    ("logit_bias", {"1": 101}, HIGHER, None),
    ("logit_bias", {"1": -101}, LOWER, None),
    ("logit_bias", {"264": 1}, HIGH, None),
    ("allowed_token_ids", 5, TYPE, None),
    ("allowed_token_ids", [], SHORT, None),
    ("allowed_token_ids", ["a"], TYPE, "allowed_token_ids[0]"),
    ("allowed_token_ids", [1, -1], LOW, "allowed_token_ids[1]"),
    ("allowed_token_ids", [264], HIGH, None),
    ("bad_words", "x", TYPE, None),
    ("bad_words", [1], TYPE, "bad_words[0]"),
    ("bad_words", [""], "string_below_min_length", "bad_words[0]"),
    ("bad_words", ["x"] * 129, LONG, None),
    ("bad_words", ["x" * 1025], LONG, None),
    ("seed", "x", TYPE, None),
    ("seed", 1.5, TYPE, None),
    ("seed", 2**63, HIGH, None),
    ("seed", -(2**63) - 1, LOW, None),
    ("stop", 5, TYPE, None),
    ("stop", [5], TYPE, "stop[0]"),
    ("stop", "", "string_below_min_length", "stop[0]"),
    ("stop", ["x"] * 17, LONG, None),
    ("stop_token_ids", 5, TYPE, None),
    ("stop_token_ids", [-1], LOW, "stop_token_ids[0]"),
    ("stop_token_ids", [264], HIGH, None),
    ("min_tokens", "x", TYPE, None),
    ("min_tokens", -1, LOW, None),
    ("min_tokens", 9, HIGH, None),
    ("prompt_logprobs", "x", TYPE, None),
    ("prompt_logprobs", -2, LOW, None),
    ("prompt_logprobs", 21, HIGH, None),
    ("stream_options", [], TYPE, None),
    ("stream_options", {"include_usage": 1}, TYPE, "stream_options.include_usage"),
    ("stream_options", {"include_usage": True}, VALUE, None),
    ("stream_interval", "x", TYPE, None),
    ("stream_interval", 0, LOW, None),
    ("truncate_prompt_tokens", "x", TYPE, None),
    ("truncate_prompt_tokens", -2, LOW, None),
    ("truncate_prompt_tokens", 0, LOW, None),
    ("truncate_prompt_tokens", 257, HIGH, None),
    ("truncation_side", "middle", VALUE, None),
    ("truncation_side", 5, TYPE, None),
    ("repetition_penalty", 5e-324, LOWER, None),  # would overflow the logits
    ("length_penalty", "x", TYPE, None),
    ("length_penalty", -10.1, LOWER, None),
    ("length_penalty", 10.1, HIGHER, None),
    ("thinking_token_budget", True, TYPE, None),
    ("thinking_token_budget", 1.5, TYPE, None),
    ("thinking_token_budget", -2, LOW, None),
    ("thinking_token_budget", 5, "unsupported_parameter", None),  # no format of reasoning
    ("vllm_xargs", 5, TYPE, None),
    ("vllm_xargs", {"a": 1}, "unsupported_parameter", None),  # no --logits-processors
    ("vllm_xargs", {"a": {}}, TYPE, "vllm_xargs.a"),
    ("vllm_xargs", {"a": [1, None]}, TYPE, "vllm_xargs.a"),
    ("vllm_xargs", {"a": True}, TYPE, "vllm_xargs.a"),
    ("repetition_detection", 5, TYPE, None),
    (
        "repetition_detection",
        {"max_pattern_size": "x"},
        TYPE,
        "repetition_detection.max_pattern_size",
    ),
    (
        "repetition_detection",
        {"max_pattern_size": -1},
        LOW,
        "repetition_detection.max_pattern_size",
    ),
    (
        "repetition_detection",
        {"max_pattern_size": 2, "min_count": 1},
        LOW,
        "repetition_detection.min_count",
    ),
    ("repetition_detection", {"x": 1}, "unknown_parameter", "repetition_detection.x"),
    ("logprob_token_ids", 5, TYPE, None),
    ("logprob_token_ids", [1, -1], LOW, "logprob_token_ids[1]"),
    ("logprob_token_ids", [1] * 129, LONG, None),
    ("logprob_token_ids", [1], VALUE, None),  # needs logprobs
    ("priority", "x", TYPE, None),
    ("priority", 2**31, HIGH, None),
    ("priority", -(2**31) - 1, LOW, None),
    ("cache_salt", 5, TYPE, None),
    ("cache_salt", "", "string_below_min_length", None),
    ("cache_salt", "x" * 129, "string_above_max_length", None),
    *[("cache_salt", f"a{char}b", VALUE, None) for char in "@/\\\0"],
    ("request_id", 5, TYPE, None),
    ("request_id", "a b", VALUE, None),
    ("request_id", "x" * 129, VALUE, None),
    *[(name, 1, TYPE, None) for name in SHAPES],
    ("guided_json", "", None, None),
    ("json_schema", "{", None, None),
    *[(name, "yes", TYPE, None) for name in FLAGS],
    *[(name, 1, TYPE, None) for name in FLAGS],
]
CHAT: list[tuple[str, Any, str | None, str | None]] = [
    ("max_completion_tokens", "x", TYPE, None),
    ("max_completion_tokens", 0, LOW, None),
    ("max_completion_tokens", 257, HIGH, None),
    ("logprobs", 1, TYPE, None),
    ("top_logprobs", "x", TYPE, None),
    ("top_logprobs", -2, LOW, None),
    ("top_logprobs", 1, VALUE, None),
    ("add_generation_prompt", 1, TYPE, None),
    ("continue_final_message", 1, TYPE, None),
    ("continue_final_message", True, VALUE, None),
    ("return_prompt_text", 1, TYPE, None),
    ("tools", {}, TYPE, None),
    ("tool_choice", "auto", VALUE, None),
    ("parallel_tool_calls", "no", TYPE, None),
    ("include_reasoning", 0, TYPE, None),
    ("reasoning_effort", "utmost", VALUE, None),
    ("reasoning_effort", 3, TYPE, None),
    ("reasoning", 5, TYPE, None),
    ("reasoning", {"effort": "utmost"}, VALUE, "reasoning.effort"),
    ("reasoning", {"max_tokens": 5}, "unsupported_parameter", "reasoning.max_tokens"),
    ("thinking", 5, TYPE, None),
    ("thinking", {"budget_tokens": -1}, LOW, "thinking.budget_tokens"),
    ("documents", {}, TYPE, None),
    ("documents", ["x"], TYPE, "documents[0]"),
    ("chat_template", 5, TYPE, None),
    ("chat_template", "{{ messages }}", "unsupported_parameter", None),  # nobody trusts it
    ("chat_template_kwargs", [], TYPE, None),
    (
        "chat_template_kwargs",
        {"tokenize": True},
        "unsupported_parameter",
        "chat_template_kwargs.tokenize",
    ),
    ("messages", "x", TYPE, None),
    ("messages", [], SHORT, None),
    ("messages", None, "missing_required_parameter", None),
]
COMPLETIONS: list[tuple[str, Any, str | None, str | None]] = [
    ("logprobs", True, TYPE, None),
    ("logprobs", -2, LOW, None),
    ("logprobs", 21, HIGH, None),
    ("suffix", 5, TYPE, None),
    ("suffix", "x", "unsupported_parameter", None),  # a model that was not taught it
    ("best_of", "x", TYPE, None),
    ("best_of", True, TYPE, None),
    ("best_of", 0, LOW, None),
    ("best_of", 129, HIGH, None),
    ("prompt", None, "missing_required_parameter", None),
    ("prompt", 5, TYPE, None),
    ("prompt", {}, TYPE, None),
    ("prompt", [], SHORT, None),
    ("prompt", "", VALUE, None),
    ("prompt", [[]], SHORT, "prompt[0]"),
    ("prompt", [1, "a"], TYPE, "prompt[1]"),
    ("prompt", [1, True], TYPE, "prompt[1]"),
    ("prompt", ["a", 1], TYPE, "prompt[1]"),
    ("prompt", [1.5], TYPE, "prompt[0]"),
    ("prompt", [[1], [-1]], LOW, "prompt[1][0]"),
    ("prompt", [2**31], HIGH, "prompt[0]"),
    ("prompt", [264], HIGH, None),
    ("prompt", ["a", ""], VALUE, "prompt[1]"),
    ("prompt", [[1], [264]], HIGH, "prompt[1]"),
    ("prompt", ["a", "x" * 300], "context_length_exceeded", "prompt[1]"),
    ("prompt", ["x"] * 1025, LONG, None),
]
CASES = [("chat", *case) for case in SHARED + CHAT]
CASES += [("completions", *case) for case in SHARED + COMPLETIONS]


@pytest.mark.parametrize(("route", "name", "value", "code", "param"), CASES)
async def test_a_bad_value_is_one_400_that_names_the_field(
    route: str, name: str, value: Any, code: str | None, param: str | None
) -> None:
    async with open_api() as api:
        body: dict[str, Any] = {"model": MODEL, "max_tokens": 8}
        if route == "chat":
            body["messages"] = [{"role": "user", "content": "hi"}]
        else:
            body["prompt"] = "hi"
        path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
        answer = await api.post(path, body | {name: value})
        assert answer.status_code == (404 if value == "gone" else 400), answer.text
        assert list(answer.json()) == ["error"]
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert (error["param"], error["code"]) == (param or name, code)
        assert not api.engine.requests
        assert (await api.post(path, body)).status_code == 200


@pytest.mark.parametrize(("body", "cases"), [(ChatBody, CHAT), (CompletionBody, COMPLETIONS)])
def test_the_table_has_every_field(body: type[RequestBody], cases: list[Any]) -> None:
    assert {case[0] for case in SHARED + cases} == set(body.model_fields)


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_what_is_not_built_is_refused_by_name(route: str) -> None:
    async with open_api() as api:
        ask = api.chat if route == "chat" else api.complete
        body = ChatBody if route == "chat" else CompletionBody
        for name, harmless in UNSUPPORTED.items():
            if name in body.model_fields:
                continue
            answer = await ask(**{name: {"some": "thing"}})
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            for value in (None, *harmless):
                assert (await ask(**{name: value})).status_code == 200, (name, value)
        assert (await ask(thinking_token_budget=-1.0)).status_code == 400  # no integer


CHOICES = [
    ("truncation_side", "mid", "left, right"),
    ("reasoning_effort", "mid", "none, minimal, low, medium, high, xhigh, max"),
    ("reasoning", {"effort": "mid"}, "none, minimal, low, medium, high, xhigh, max"),
    ("thinking", {"type": "mid"}, "enabled, disabled, adaptive"),
    ("response_format", {"type": "mid"}, "text, json_object, json_schema, structural_tag"),
    ("tool_choice", "mid", "none, auto, required"),
    ("messages", [{"role": "mid", "content": "x"}], ", ".join(ROLES)),
]


@pytest.mark.parametrize(("name", "value", "choices"), CHOICES)
async def test_a_wrong_choice_is_told_what_it_is_and_what_there_is(
    name: str, value: Any, choices: str
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    async with open_api() as api:
        error = (await api.chat(**{"tools": tools, name: value})).json()["error"]
    assert error["message"].endswith(f": supported values are {choices}, got 'mid'")
    assert error["code"] == VALUE


async def test_null_inside_is_as_if_absent() -> None:
    nulls = dict.fromkeys(["max_pattern_size", "min_pattern_size", "min_count"])
    async with open_api() as api:
        answer = await api.chat(repetition_detection=nulls)
        assert answer.status_code == 200, answer.text
        answer = await api.chat(repetition_detection=nulls | {"max_pattern_size": 2})
        assert answer.status_code == 200, answer.text
        found = api.engine.requests[1].params.repetition_detection
        assert found == RepetitionDetection(max_pattern_size=2)


async def test_ignored_fields_are_named_and_change_nothing() -> None:
    names = ["store", "metadata", "user", "service_tier", "prediction", "safety_identifier"]
    names += ["prompt_cache_key", "verbosity", "made_up"]
    async with open_api() as api:
        plain = (await api.chat()).json()
        answer = await api.chat(**dict.fromkeys(names, "x"), **{"a\r\nb: c": 1, "null": None})
        assert answer.headers["x-llmserve-ignored"] == ", ".join(names)
        assert answer.json()["choices"] == plain["choices"]
        assert "x-llmserve-ignored" not in (await api.chat()).headers
        many = await api.chat(**{f"field_{i}" + "x" * 500: 1 for i in range(1000)})
        assert len(many.headers["x-llmserve-ignored"]) < 2000


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "it is empty"),
        (b'{"a": 1,\n "b": }', "at line 2 column 7"),
        (b'{"a": 1', "at line 1 column 8"),
        (b'{"a": NaN}', "NaN is no JSON number, at line 1 column 7"),
        (
            b'{"x": "NaN",\n "a": [1, -Infinity]}',
            "-Infinity is no JSON number, at line 2 column 11",
        ),
        (b'{"a": "\xff"}', "not UTF-8 at line 1 column 8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1e999}', "1e999 is too large a number, at line 1 column 7"),
        (b'{"a": "\\ud800", "b": 1}', "half of a surrogate pair at line 1 column 8"),
        (b'{"a": "\\ud83d\\ude00",\n"b": "\\ude00"}', "a surrogate pair at line 2 column 7"),
        (b'{"a": "\x01"}', "Invalid control character at line 1 column 8"),
        (b'{"\xc3\xa9": "\xff"}', "not UTF-8 at line 1 column 8"),
        (b'\xef\xbb\xbf{"a": 1}', "at line 1 column 1"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 at line 1 column 1"),
        (b"[1]", "must be a JSON object"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "... is too large a number, at line 1 column 7"),
        (b'{"prompt": [' + b"9" * 4000 + b"]}", "... is no token id"),
        (b'{"prompt": "a", "logit_bias": {"1": ' + b"9" * 4000 + b"}}", "got 999"),
        (b'{"prompt": "a", "n": ' + b"9" * 4000 + b"}", "it must be at most 128, got 999"),
    ],
)
async def test_what_is_no_json_object_is_a_400_that_says_where(data: bytes, fault: str) -> None:
    async with open_api() as api:
        answer = await api.client.post(
            "/v1/completions", content=data, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400
    assert fault in answer.json()["error"]["message"]
    assert len(answer.text) < 1000


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_other_content_types_are_refused(content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    async with open_api() as api:
        answer = await api.client.post("/v1/completions", content=b"{}", headers=headers)
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]
        good = {"content-type": "Application/JSON; charset=utf-8"}
        body = b'{"prompt": "hi"}'
        answer = await api.client.post("/v1/completions", content=body, headers=good)
        assert answer.status_code == 200
        good["content-encoding"] = "gzip"
        answer = await api.client.post("/v1/completions", content=body, headers=good)
        assert answer.status_code == 415


def test_sampling_fields_are_those_that_were_given() -> None:
    body = ChatBody.parse({"temperature": 0.5, "top_p": None, "stop": "x", "n": 1})
    assert body.sampling_fields() == {"temperature": 0.5, "stop": ["x"], "n": 1}


def test_a_limit_names_its_field() -> None:
    TokenLimit(None, "max_tokens").check(1, 10)
    TokenLimit(10, "max_tokens").check(1, 10)
    for value in (0, 11):
        with pytest.raises(RequestError) as info:
            TokenLimit(value, "max_completion_tokens").check(1, 10)
        assert info.value.param == "max_completion_tokens"


def test_request_ids() -> None:
    assert fields.valid_request_id("aZ09._-" + "x" * 121)
    assert not any(map(fields.valid_request_id, ("", "x" * 129, "a b", "a\r\nb", "ä", "a/b")))
