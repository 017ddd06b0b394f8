# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the engine is asked to bind an answer to, by every field that says so."""

from typing import Any

import pytest

from llmserve.core.messages import RequestExtra
from llmserve.core.structured_outputs import GRAMMAR_ERROR, GrammarSpec
from tests.helpers.api import open_api

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}
LOOSE = {"name": "n", "schema": {"properties": {"ä/": {"uniqueItems": True}}}}

BOUND: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": FORMAT}, "json", "response_format"),
    ({"response_format": {"type": "json_object"}}, "json", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "json",
     "response_format"),
    ({"response_format": {"type": "structural_tag"} | TAG}, "structural_tag", "response_format"),
    ({"structured_outputs": {"json": SCHEMA}}, "json", "structured_outputs"),
    ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"]}}, "ebnf", "structured_outputs"),
    ({"guided_json": SCHEMA}, "json", "guided_json"),
    ({"guided_json": '{"type": "null"}'}, "json", "guided_json"),
    ({"guided_regex": "a"}, "regex", "guided_regex"),
    ({"guided_choice": ["a"]}, "ebnf", "guided_choice"),
    ({"guided_grammar": 'root ::= "a"'}, "ebnf", "guided_grammar"),
    ({"guided_json_object": True}, "json", "guided_json_object"),
    ({"regex": "a"}, "regex", "regex"),
    ({"ebnf": 'root ::= "a"'}, "ebnf", "ebnf"),
    ({"json_schema": SCHEMA}, "json", "json_schema"),
    ({"grammar": 'start: "a"'}, "lark", "grammar"),
    ({"structural_tag": TAG}, "structural_tag", "structural_tag"),
    # the same kind twice: response_format wins
    ({"response_format": FORMAT, "structured_outputs": {"json": {"type": "null"}}}, "json",
     "response_format"),
]  # fmt: skip


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(("fields", "kind", "param"), BOUND)
async def test_bound(fields: dict[str, Any], kind: str, param: str, route: str) -> None:
    async with open_api() as api:
        answer = await (api.chat if route == "chat" else api.complete)(**fields, n=2, seed=1)
        assert answer.status_code == 200, answer.text
        assert "x-llmserve-ignored" not in answer.headers
        specs = [request.params.grammar for request in api.engine.requests]
        assert len(specs) == 2 and specs[0] == specs[1] and isinstance(specs[0], GrammarSpec)
        assert (specs[0].kind, specs[0].param) == (kind, param)
        assert all(r.params.structured_outputs is None for r in api.engine.requests)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"guided_json_object": False},
    ],
)
async def test_free(fields: dict[str, Any]) -> None:
    async with open_api() as api:
        assert (await api.chat(**fields)).status_code == 200
        assert api.engine.requests[0].params.grammar is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": 1}, "response_format", "object"),
        ({"response_format": {}}, "response_format.type", "Missing"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": []}},
         "response_format.json_schema", "object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema.name", "Missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": 1}}},
         "response_format.json_schema.name", "string"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": 1}}},
         "response_format.json_schema.strict", "boolean"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 1}}},
         "response_format.json_schema.schema", "object"),
        ({"response_format": {"type": "json_schema",
                              "json_schema": LOOSE | {"strict": True}}},
         "response_format", "#/properties/ä~1/uniqueItems"),
        ({"structured_outputs": 1}, "structured_outputs", "object"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "exactly"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs", "xml"),
        ({"structured_outputs": {"param": "a", "regex": "a"}}, "structured_outputs", "param"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex",
         "expected a string, but got an integer instead"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json",
         "expected an object or a string, but got an integer instead"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]",
         "expected a string, but got an integer instead"),
        ({"structured_outputs": {"regex": "a", "strict": 1}}, "structured_outputs.strict",
         "expected a boolean, but got an integer instead"),
        ({"guided_json": [1]}, "guided_json",
         "expected an object or a string, but got an array instead"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "true"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs",
         "contradicts"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json"),
        ({"guided_choice": ["a"], "response_format": FORMAT}, "guided_choice", "response_format"),
        ({"guided_choice": "a"}, "guided_choice", "array"),
        ({"guided_json": {"type": "strin"}}, "guided_json", "#/type"),
    ],
)  # fmt: skip
async def test_refused(fields: dict[str, Any], param: str, said: str, stream: bool) -> None:
    async with open_api() as api:
        answer = await api.chat(**fields, stream=stream)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert said in error["message"]
        assert not api.engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_finds_is_a_400_before_any_byte(stream: bool) -> None:
    async with open_api() as api:
        api.engine.fail_at = 0
        api.engine.failure = RequestExtra(
            finish_reason="error", error=GRAMMAR_ERROR, message="no way"
        )
        answer = await api.chat(guided_regex="a", stream=stream)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("guided_regex", None)
        assert "no way" in error["message"]


async def test_dropped_keywords_are_named_beside_ignored_fields() -> None:
    async with open_api() as api:
        wanted = "#/properties/%C3%A4~1/uniqueItems"
        form = {"type": "json_schema", "json_schema": LOOSE}
        answer = await api.chat(response_format=form)
        assert answer.headers["x-llmserve-ignored"] == wanted
        answer = await api.chat(response_format=form, guided_decoding_backend="outlines")
        assert answer.headers["x-llmserve-ignored"] == f"guided_decoding_backend, {wanted}"
