# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Whatever such a grammar lets a model write is a call of valid arguments to its parser."""

import json
import random
from typing import Any

import jsonschema
import pytest

from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.parsers.call_grammar import forced_calls
from llmserve.parsers.literal_grammar import _KNOWN, literal_grammar, unbound
from llmserve.parsers.registry import TOOL_PARSERS
from llmserve.structured_output.prepare import prepare
from tests.helpers.grammar import accepts, compiled, walk
from tests.helpers.parsers import Output

SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "string"},
            "c": {"enum": ["x", 'y"z\n', None, 3, True]},
            "d": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
            "e": {
                "type": "object",
                "properties": {"k": {"type": ["boolean", "null"]}, "l": {"const": [1, {"m": 2}]}},
                "required": ["k"],
                "additionalProperties": False,
            },
        },
        "required": ["b", "d"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}, "v": {"anyOf": [{"type": "null"}, {}]}},
        "required": ["tree"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/node"}, "size": {"type": "integer"}},
                "required": ["size"],
            }
        },
    },
]


@pytest.mark.parametrize("name", ["pythonic", "lfm2", "olmo3", "gemma4", "functiongemma"])
def test_what_is_written_is_a_valid_call(name: str) -> None:
    rng = random.Random(8)
    finished = 0
    for schema in SCHEMAS:
        tag = forced_calls(TOOL_PARSERS.load(name).envelope, {"f": schema}, None, True)
        grammar = compiled(prepare(StructuredOutputsParams(structural_tag={"format": tag}), "auto"))
        output = Output(name, tools={"f": schema})
        for _ in range(25):
            written = walk(grammar, rng)
            if written is None:
                continue
            finished += 1
            found = output.parse(written.decode(errors="replace"))
            assert found.calls and not found.content.strip(), written
            for called, arguments in found.calls:
                assert called == "f"
                jsonschema.validate(json.loads(arguments), schema)
    assert finished > 50


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("pythonic", '[f(b="x", d=[1])]', ['[f(d=[1])]', "[f(b=1, d=[1])]", '[f(b="x", d=[])]']),
        ("gemma4", '<|tool_call>call:f{b:<|"|>x<|"|>,d:[1]}<tool_call|>', [
            "<|tool_call>call:f{d:[1]}<tool_call|>", "<|tool_call>call:f{b:x,d:[1]}<tool_call|>",
        ]),
    ],
)  # fmt: skip
def test_required_types_and_bounds(name: str, good: str, bad: list[str]) -> None:
    tag = forced_calls(TOOL_PARSERS.load(name).envelope, {"f": SCHEMAS[3]}, None, True)
    grammar = compiled(prepare(StructuredOutputsParams(structural_tag={"format": tag}), "auto"))
    assert accepts(grammar, good)
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize(("name", "quote"), [("gemma4", '<|"|>'), ("functiongemma", "<escape>")])
def test_texts_of_a_schema_have_the_quotes_of_their_style(name: str, quote: str) -> None:
    schema = {"properties": {"e": {"enum": ["a", 5]}}, "required": ["e"]}
    envelope = TOOL_PARSERS.load(name).envelope
    tag = forced_calls(envelope, {"f": schema}, None, True)
    grammar = compiled(prepare(StructuredOutputsParams(structural_tag={"format": tag}), "auto"))
    for value, written in (("a", f"{quote}a{quote}"), (5, "5")):
        text = envelope.begin.replace("{name}", "f") + f"{{e:{written}}}" + envelope.end
        assert accepts(grammar, text)
        assert json.loads(Output(name, tools={"f": schema}).parse(text).calls[0][1]) == {"e": value}


def test_what_is_not_bound_is_named() -> None:
    assert [list(unbound(schema)) for schema in SCHEMAS] == [[]] * len(SCHEMAS)
    schema = {
        "properties": {
            "a b": {},
            "c": {"type": "string", "pattern": "x"},
            "d": {"items": {"minimum": 1}},
        },
        "anyOf": [{"not": {}}],
    }
    assert list(unbound(schema)) == [
        "/properties/a b",
        "/properties/c/pattern",
        "/properties/d/items/minimum",
        "/anyOf/0/not",
    ]


@pytest.mark.parametrize("keyword", sorted(_KNOWN | {"else"}))
def test_a_schema_that_is_none_raises_nothing(keyword: str) -> None:
    """Whoever compiles the grammar says what is wrong with it."""
    for junk in (None, 5, -1, "x", "#/a/b", [], {}, [{}], {"a": 5}, {"a": {"minItems": "x"}}):
        for schema in ({keyword: junk}, {"properties": {"a": {"type": "array", keyword: junk}}}):
            for style in ("python", "gemma", "functiongemma"):
                assert literal_grammar(schema, style).startswith("root ::= ")  # type: ignore[arg-type]
            list(unbound(schema))
