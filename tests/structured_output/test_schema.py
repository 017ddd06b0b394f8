# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the normal form lets through, by either engine, against `jsonschema`."""

import json
import random
import subprocess
import sys
import tarfile
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema.validators import SPECIFICATIONS
from referencing.jsonschema import DRAFT202012

from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.errors import GrammarError, RequestError
from llmserve.structured_output.known import known_document
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.schema import MAX_SECONDS, MAX_WHITESPACE, Normalizer
from tests.helpers.clock import in_time
from tests.helpers.grammar import accepts, accepts_json, compiled, grammar, random_schema, walk

Schema = dict[str, Any] | bool
ENGINES = ("auto", "guidance")
P = {"type": "object", "properties": {"a": {"type": "integer"}}}
REF = {"$defs": {"n": {"type": "integer"}}}

# schema, a value that it allows, a value that it forbids
KEYWORDS: dict[str, tuple[Schema, Any, Any]] = {
    "type": ({"type": "integer"}, 1, "1"),
    "type list": ({"type": ["string", "null"]}, None, 1),
    "enum": ({"enum": ["a", 1, None, [2], {"b": 3}]}, {"b": 3}, "b"),
    "enum and type": ({"type": "string", "enum": ["a", 1]}, "a", 1),
    "const": ({"const": {"a": [1, True]}}, {"a": [1, True]}, {"a": [1, 1]}),
    "minimum": ({"type": "integer", "minimum": 5}, 5, 4),
    "maximum": ({"type": "integer", "maximum": 5}, -7, 6),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 5}, 6, 5),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 5}, 4.5, 5),
    "bounds of an integer": ({"type": "integer", "minimum": 1.5, "maximum": 3.5}, 3, 1),
    "exclusive of draft 4": ({"type": "integer", "minimum": 5, "exclusiveMinimum": True}, 6, 5),
    "multipleOf": ({"type": "integer", "multipleOf": 7, "minimum": 3}, 14, 13),
    "multipleOf twice": ({"allOf": [{"multipleOf": 4}, {"multipleOf": 6}]}, 24, 12 + 4),
    "bound without a type": ({"minimum": 3}, 4, 2),
    "minLength": ({"type": "string", "minLength": 2}, 'a"', "a"),
    "maxLength": ({"type": "string", "maxLength": 2}, "\n\\", "abc"),
    "maxLength of characters": ({"type": "string", "maxLength": 2}, "éß", "éßx"),
    "pattern is not anchored": ({"type": "string", "pattern": "b"}, "abc", "ac"),
    "pattern is anchored": ({"type": "string", "pattern": "^a+$"}, "aa", "aab"),
    "pattern and length": ({"type": "string", "pattern": "^a+$", "maxLength": 3}, "aaa", "aaaa"),
    "two patterns": ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "xbay", "xay"),
    "digits are ASCII": ({"type": "string", "pattern": r"^\d$"}, "7", "٣"),
    "format": ({"type": "string", "format": "date"}, "2024-02-29", "yesterday"),
    "items": ({"type": "array", "items": {"type": "integer"}}, [1, 2], [1, "2"]),
    "prefixItems": ({"prefixItems": [{"type": "integer"}], "items": False}, [1], [1, 1]),
    "items of draft 7": ({"items": [{"type": "integer"}], "additionalItems": False}, [1], ["1"]),
    "minItems": ({"type": "array", "minItems": 2}, [1, "b"], [1]),
    "maxItems": ({"type": "array", "maxItems": 1}, [1], [1, 2]),
    "contains": ({"type": "array", "contains": {"const": 1}}, [1, 2], [2, 3]),
    "maxContains": ({"contains": {"const": 1}, "maxContains": 1}, [1], [1, 1]),
    "uniqueItems of one": ({"type": "array", "uniqueItems": True, "maxItems": 1}, [1], [1, 1]),
    "properties": (P, {"a": 1}, {"a": "x"}),
    "required": (P | {"required": ["a"]}, {"a": 1}, {}),
    "required without properties": ({"type": "object", "required": ["b"]}, {"b": []}, {}),
    "additionalProperties": (
        P | {"additionalProperties": {"type": "boolean"}}, {"a": 1, "b": True}, {"b": 1},
    ),
    "an open object keeps its names": (P | {"additionalProperties": True}, {"z": 1}, {"a": "x"}),
    "patternProperties": (
        {"patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
        {"x1": None}, {"y": None},
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    "propertyNames": ({"propertyNames": {"pattern": "^x"}}, {"x": 1}, {"y": 1}),
    "propertyNames enum": ({"propertyNames": {"enum": ["k", "l"]}}, {"k": 1}, {"m": 1}),
    "propertyNames length": ({"propertyNames": {"maxLength": 2}}, {"ab": 1}, {"abc": 1}),
    "dependentRequired": (
        {"properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        {"a": 1, "b": 2}, {"a": 1},
    ),
    "dependentSchemas": (
        {"properties": {"a": {}, "b": {}}, "dependentSchemas": {"a": {"required": ["b"]}}},
        {"b": 2}, {"a": 1},
    ),
    "$ref": (REF | {"$ref": "#/$defs/n"}, 1, "x"),
    "$ref beside others": (REF | {"$ref": "#/$defs/n", "maximum": 3}, 3, 4),
    "$ref to itself": (
        P | {"properties": {"n": {"$ref": "#"}, "v": {"type": "integer"}}, "required": ["v"]},
        {"n": {"n": {"v": 1}, "v": 2}, "v": 3}, {"n": {"n": {}, "v": 2}, "v": 3},
    ),
    "$anchor": ({"$defs": {"n": {"$anchor": "num", "type": "integer"}}, "$ref": "#num"}, 1, "x"),
    "allOf": (
        {"allOf": [P, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
        {"a": 1, "b": None}, {"a": 1},
    ),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    "anyOf beside others": (
        P | {"anyOf": [{"required": ["a"]}, {"properties": {"b": {"const": 1}}}]},
        {"b": 1}, {"b": 2},
    ),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "x", None),
    "oneOf that overlaps": ({"oneOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, 2, 4),
    "not": ({"type": ["string", "integer"], "not": {"type": "string"}}, 1, "x"),
    "not a pattern": ({"type": "string", "not": {"pattern": "b+$"}}, "bba", "abb"),
    "not a type": ({"not": {"type": ["string", "boolean"]}}, None, True),
    "not a number": ({"type": "integer", "not": {"enum": [3, 5]}}, 4, 5),
    "not an object": ({"type": "object", "not": {"const": {"a": 1}}}, {"a": 2}, {"a": 1}),
    "not an array": ({"type": "array", "not": {"const": [1, 2]}}, [1, 3], [1, 2]),
    "not items": ({"type": "array", "not": {"items": {"type": "integer"}}}, ["x", 1], [1, 2]),
    "not contains": ({"type": "array", "not": {"contains": {"const": 1}}}, [2, 3], [2, 1]),
    "not a conclusion": (
        {"type": "string", "not": {"if": {"maxLength": 3}, "then": {"pattern": "^a"},
                                   "else": {"pattern": "z$"}}},
        "bcd", "abc",
    ),
    "not a value": ({"enum": ["a", "b"], "not": {"const": "b"}}, "a", "b"),
    "not a property": (P | {"not": {"required": ["a"]}}, {}, {"a": 1}),
    "if": (
        {"properties": {"k": {"enum": [1, 2]}, "x": {}, "y": {}}, "type": "object",
         "required": ["k"], "if": {"properties": {"k": {"const": 1}}},
         "then": {"required": ["x"]}, "else": {"required": ["y"]}},
        {"k": 2, "y": 0}, {"k": 2, "x": 0},
    ),
    "oneOf patterns": (
        {"type": "string", "oneOf": [{"pattern": "^a"}, {"pattern": "z$"}]}, "abc", "az",
    ),
    "if a pattern": (
        {"type": "object", "properties": {"c": {"type": "string"}, "zip": {"type": "integer"}},
         "required": ["c"], "if": {"properties": {"c": {"pattern": "^U"}}},
         "then": {"required": ["zip"]}},
        {"c": "DE"}, {"c": "US"},
    ),
    "patternProperties that overlap": (
        {"patternProperties": {"^a": {"type": "integer"}, "z$": {"maximum": 5}}},
        {"a": 9, "bz": 3, "az": 4}, {"az": 9},
    ),
    "patternProperties of an allOf": (
        {"allOf": [{"patternProperties": {"^x": {}}}], "properties": {"y": {}},
         "additionalProperties": False},
        {"y": 1}, {"x": 1},
    ),
    "patternProperties beside properties": (
        {"properties": {"foo": {"type": "integer"}}, "patternProperties": {"f.o": {"minimum": 2}}},
        {"foo": 2}, {"foo": 1},
    ),
    "propertyNames and patterns": (
        {"propertyNames": {"pattern": "^[a-z]+$"}, "patternProperties": {"^x": {"type": "null"}}},
        {"xy": None}, {"X": None},
    ),
    "propertyNames format": (
        {"propertyNames": {"format": "date"}, "additionalProperties": {"type": "null"}},
        {"2024-02-03": None}, {"today": None},
    ),
    "minContains": ({"contains": {"const": 1}, "minContains": 2}, [1, 1, 2], [1, 2]),
    "maxContains of more": (
        {"contains": {"const": 1}, "maxContains": 1, "minItems": 3}, [1, 2, 2], [1, 2, 1],
    ),
    "contains twice": (
        {"allOf": [{"contains": {"const": 1}}, {"contains": {"const": 2}}]}, [1, 2], [1, 1],
    ),
    "uniqueItems of a list": (
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        ["c", "a"], ["a", "a"],
    ),
    "multipleOf of an integer": ({"type": "integer", "multipleOf": 1.5}, 6, 5),
    "unevaluatedItems": (
        {"prefixItems": [{}], "anyOf": [{"prefixItems": [{}, {"const": 2}]}, True],
         "unevaluatedItems": False},
        [1, 2], [1, 3],
    ),
    "unevaluatedProperties elsewhere": (
        {"allOf": [{"properties": {"a": {}}}, {"unevaluatedProperties": False}]}, {}, {"a": 1},
    ),
    "unevaluatedProperties of a choice": (
        {"properties": {"k": {}}, "required": ["k"], "unevaluatedProperties": False,
         "if": {"properties": {"k": {"const": 1}}}, "then": {"properties": {"x": {}}}},
        {"k": 1, "x": 0}, {"k": 2, "x": 0},
    ),
    "$dynamicRef": (
        {"$id": "https://x.example/strings", "$ref": "list",
         "$defs": {"item": {"$dynamicAnchor": "item", "type": "string"},
                   "list": {"$id": "list", "type": "array", "items": {"$dynamicRef": "#item"},
                            "$defs": {"item": {"$dynamicAnchor": "item"}}}}},
        ["a"], [1],
    ),
    "$ref to a metaschema": (
        {"$ref": "https://json-schema.org/draft/2020-12/meta/validation#/$defs/simpleTypes"},
        "string", "text",
    ),
    "$ref in a URN": (
        {"$id": "urn:uuid:deadbeef-1234-0000-0000-4321feebdaed", "$ref": "#/$defs/n",
         "$defs": {"n": {"type": "integer"}}}, 1, "x",
    ),
    "unevaluatedProperties": (
        {"allOf": [P], "properties": {"b": {}}, "unevaluatedProperties": False},
        {"b": 1, "a": 1}, {"c": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", KEYWORDS)
def test_keyword_excludes_what_violates_it(name: str, engine: str) -> None:
    schema, good, bad = KEYWORDS[name]
    validator = jsonschema.Draft202012Validator(schema)
    if "draft" not in name:
        assert validator.is_valid(good)
        format_alone = "format" in name or name == "digits are ASCII"
        assert format_alone or not validator.is_valid(bad)
    made = grammar(engine, json=schema)
    assert accepts_json(made, good)
    assert not accepts_json(made, bad)


@pytest.mark.parametrize(
    ("schema", "value", "is_open"),
    [
        (P, {"z": 1}, False),
        (P | {"additionalProperties": False}, {"z": 1}, False),
        (P | {"additionalProperties": True}, {"z": 1}, True),
        (P | {"additionalProperties": {}}, {"z": [1]}, True),
        ({"type": "object"}, {"z": 1}, True),
        ({"type": "object", "minProperties": 1}, {"z": 1}, True),
        ({"type": "array"}, [1, "x"], True),
        ({"prefixItems": [{"type": "integer"}]}, [1, "x"], True),
        ({"allOf": [P, {"properties": {"b": {}}}]}, {"a": 1, "z": 1}, False),
    ],
)
def test_both_engines_close_the_same_objects(schema: Schema, value: Any, is_open: bool) -> None:
    for engine in ENGINES:
        assert accepts_json(grammar(engine, json=schema), value) == is_open


def test_random_texts_of_random_schemas_are_valid() -> None:
    rng = random.Random()
    finished = 0
    for depth in (0, 1, 2, 3) * 12:
        schema = random_schema(rng, depth)
        validator = jsonschema.Draft202012Validator(schema)
        for engine in ENGINES:
            made = grammar(engine, json=schema)
            for _ in range(2):
                text = walk(made, rng)
                if text is not None:
                    finished += 1
                    assert validator.is_valid(json.loads(text)), (engine, schema, text)
    assert finished > 120


@pytest.mark.parametrize("engine", ENGINES)
def test_whitespace_has_an_end(engine: str) -> None:
    """Of xgrammar's grammars it is the mask that ends it: test_whitespace.py."""
    made = grammar(engine, json=P)
    is_bound = engine == "guidance"
    for count, fits in ((1, True), (MAX_WHITESPACE, True), (MAX_WHITESPACE + 1, not is_bound)):
        assert accepts(made, '{"a":' + "\n" * count + "1}") == fits
    assert not accepts(made, ' {"a":1}') and not accepts(made, '{"a":1} ')
    compact = grammar(engine, json=P, disable_any_whitespace=True)
    assert accepts(compact, '{"a":1}') and not accepts(compact, '{"a": 1}')


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"properties": {"a/b": {"items": {"uniqueItems": True}}}},
         "#/properties/a~1b/items/uniqueItems"),
        ({"oneOf": [{"pattern": "(?=a)"}, {"pattern": "b"}]}, "#/oneOf/0/pattern"),
        ({"properties": {"a": {"pattern": "^(?!x)"}}}, "#/properties/a/pattern"),
        ({"propertyNames": {"pattern": r"\bx"}}, "#/propertyNames/pattern"),
        ({"patternProperties": {r"(a)\1": {}}}, "#/patternProperties"),
        ({"not": {"format": "date"}}, "#/not"),
        ({"contains": False}, "#"),
        ({"multipleOf": 20011}, "#/multipleOf"),
        ({"$ref": "http://elsewhere.example/x"}, "#/$ref"),
        ({"$ref": "#/$defs/none"}, "#/$ref"),
        ({"type": "strin"}, "#/type"),
        ({"properties": {"a": {"minLength": -1}}}, "#/properties/a/minLength"),
        ({"anyOf": []}, "#/anyOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "#"),
        ({"properties": {"a": 3}}, "#/properties"),
        (False, "#"),
        ({"enum": ["a"], "type": "integer"}, "#"),
        ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, "#"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_pointed_at(schema: Schema, pointer: str) -> None:
    with pytest.raises(GrammarError) as caught:
        Normalizer(schema, strict=True).run()
    assert pointer in caught.value.message.replace(":", " ").split()


def test_what_nobody_enforces_is_dropped_and_named_where_that_may_be() -> None:
    loose = Normalizer({"type": "array", "items": {}, "uniqueItems": True}, strict=False)
    assert loose.run() == {"type": "array", "items": {}}
    assert loose.ignored == ["#/uniqueItems"]
    email = {"type": "string", "format": "email", "pattern": r"^(?!\.)[a-z.]+@[a-z]+$"}
    loose = Normalizer({"type": "object", "properties": {"a": email}}, strict=False)
    assert loose.run()["properties"] == {"a": {"type": "string", "format": "email"}}
    assert loose.ignored == ["#/properties/a/pattern"]


HARD = ["multipleOf", "pattern is not anchored", "maxLength", "additionalProperties",
        "patternProperties", "minProperties", "prefixItems"]  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_xgrammar_gets_only_what_it_enforces(name: str) -> None:
    spec = prepare(StructuredOutputsParams(json=KEYWORDS[name][0]), "auto")
    if name in HARD:
        assert spec.backend == "guidance"
    if name in ("type", "enum", "properties", "$ref to itself", "anyOf", "minimum"):
        assert spec.backend == "xgrammar"


def _nested(depth: int) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(depth):
        schema = {"oneOf": [schema, {"type": "array", "items": schema}]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        _nested(12),
        {"allOf": [{"anyOf": [{"required": ["a"]}, {"required": [f"b{i}"]}]} for i in range(20)]},
        {"enum": [f"value {i}" for i in range(100_000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(10_000)}},
        json.loads('{"not":' * 200 + "true" + "}" * 200),
    ],
    ids=["oneOf", "product", "enum", "properties", "depth"],
)
def test_a_hostile_schema_ends_soon(schema: Schema) -> None:
    began = time.thread_time()  # as the limit itself: others may have the cores
    try:
        Normalizer(schema, strict=True).run()
    except GrammarError as error:
        assert error.message
    in_time(time.thread_time() - began, 2 * MAX_SECONDS)


@pytest.mark.long
def test_json_schema_test_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """draft 2020-12, as it lies in the source archive of the package jsonschema; what it calls
    remote is known."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "jsonschema==4.26.0", "-d", str(tmp_path)], check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (suite,) = tmp_path.glob("*/json")
    remotes = {
        f"http://localhost:1234/{path.relative_to(suite / 'remotes')}": json.loads(path.read_text())
        for path in (suite / "remotes").rglob("*.json")
    }
    monkeypatch.setattr(
        "llmserve.structured_output.prepare.known_document",
        lambda uri: remotes.get(uri) or known_document(uri),
    )
    registry = SPECIFICATIONS.with_resources(
        (uri, DRAFT202012.create_resource(schema)) for uri, schema in remotes.items()
    )
    rng, count = random.Random(), Counter[str]()
    for path in sorted((suite / "tests/draft2020-12").glob("*.json")):
        for case in json.loads(path.read_text(), parse_float=Decimal):
            outcomes = [_judge(case, engine, registry, rng, count) for engine in ENGINES]
            count["schemas"] += 1
            count["that some value fits"] += any(test["valid"] for test in case["tests"])
            count["accepted by some engine"] += any(outcomes)
    with capsys.disabled():
        print(dict(count))
    assert count["valid ones that are let through"] > 900 and count["random texts"] > 3500
    assert count["accepted by some engine"] >= 0.95 * count["schemas"]


def _judge(
    case: dict[str, Any], engine: str, registry: Any, rng: random.Random, count: Counter[str]
) -> bool:
    """Whether it is accepted. Decimals, so that multipleOf is exact."""
    schema = case["schema"]
    try:
        plain = json.loads(json.dumps(schema, default=float))
        made = compiled(prepare(StructuredOutputsParams(json=plain), engine))
    except (RequestError, GrammarError):
        count["refusals"] += 1
        return False
    for test in case["tests"]:
        let = accepts_json(made, json.loads(json.dumps(test["data"], default=float)))
        assert test["valid"] or not let, (engine, case["description"], test["description"])
        if test["valid"]:
            count["valid ones that are let through" if let else "valid ones that are not"] += 1
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    for _ in range(6):
        text = walk(made, rng)
        count["random texts" if text is not None else "random texts without end"] += 1
        if text is not None:
            valid = validator.is_valid(json.loads(text, parse_float=Decimal))
            assert valid, (engine, case["description"], text)
    return True
