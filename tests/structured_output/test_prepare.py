# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import subprocess
import sys
from typing import Any

import pytest

from llmserve.core.structured_outputs import MAX_SPEC_BYTES, StructuredOutputsParams
from llmserve.errors import RequestError
from llmserve.structured_output.prepare import prepare
from tests.helpers.grammar import accepts_json, closed_objects, compiled

TAG = {"format": {"type": "json_schema", "json_schema": {"properties": {"a": {}}}}}


def _prepare(backend: str = "auto", **fields: Any) -> Any:
    return prepare(StructuredOutputsParams(param="the_field", **fields), backend)


@pytest.mark.parametrize(
    ("fields", "backend", "kind"),
    [
        ({"json": {"type": "integer"}}, "xgrammar", "json"),
        ({"json": {"type": "string", "maxLength": 3}}, "guidance", "json"),
        ({"json_object": True}, "xgrammar", "json"),
        ({"json": closed_objects(8, 7)}, "xgrammar", "json"),
        ({"json": closed_objects(5, 12)}, "guidance", "json"),
        ({"regex": "a+"}, "guidance", "regex"),
        ({"choice": ["a"]}, "xgrammar", "ebnf"),
        ({"grammar": 'root ::= "a"'}, "xgrammar", "ebnf"),
        ({"grammar": 'start: "a"'}, "guidance", "lark"),
        ({"structural_tag": TAG}, "xgrammar", "structural_tag"),
        ({"structural_tag": json.dumps(TAG)}, "xgrammar", "structural_tag"),
    ],
)
def test_the_engine_that_can(fields: dict[str, Any], backend: str, kind: str) -> None:
    spec = _prepare(**fields)
    assert (spec.backend, spec.kind, spec.param, spec.ignored) == (backend, kind, "the_field", [])


def test_a_named_engine_is_used_for_all_that_it_can() -> None:
    assert _prepare("guidance", json={"type": "integer"}).backend == "guidance"
    assert _prepare("xgrammar", regex="a").backend == "xgrammar"
    weak = {"type": "string", "maxLength": 3, "pattern": "^a+$"}
    with pytest.raises(RequestError, match="#/maxLength"):
        _prepare("xgrammar", json=weak)
    loose = _prepare("xgrammar", json=weak, strict=False)
    assert loose.ignored == ["#/maxLength", "#/pattern"]
    with pytest.raises(RequestError, match="structural tags"):
        _prepare("guidance", structural_tag=TAG)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"json": {}, "regex": "a"},
        {"json": ""},
        {"json": "{"},
        {"json": "nonsense"},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json_object": False},
        {"regex": ""},
        {"regex": "a\0"},
        {"choice": []},
        {"choice": ["a", ""]},
        {"grammar": ""},
        {"grammar": " " * (MAX_SPEC_BYTES + 1)},
        {"structural_tag": "{"},
        {"structural_tag": {}},
        {"structural_tag": {"structures": [{"begin": "<"}], "triggers": ["<"]}},
        {"structural_tag": {"structures": [], "triggers": []}},
    ],
)
def test_what_is_wrong_names_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        _prepare(**fields)
    assert caught.value.param == "the_field"


def test_schemas_in_tags_have_the_same_meaning() -> None:
    text = json.loads(_prepare(structural_tag=TAG).text)
    assert text["format"]["json_schema"]["additionalProperties"] is False


def test_objects_can_be_closed_from_outside() -> None:
    schema = {"properties": {"a": {}}, "additionalProperties": True}
    for closed in (False, True):
        spec = _prepare(json=schema, disable_additional_properties=closed)
        assert (json.loads(spec.text)["additionalProperties"] is False) == closed


def test_the_order_of_properties_is_kept() -> None:
    spec = _prepare(json={"properties": {"z": {}, "a": {}}})
    assert list(json.loads(spec.text)["properties"]) == ["z", "a"]


def test_a_whitespace_pattern_is_named_as_ignored() -> None:
    assert _prepare(json={}, whitespace_pattern=" ").ignored == ["the_field.whitespace_pattern"]


def test_equal_grammars_are_one_whatever_field_they_came_in() -> None:
    one = prepare(StructuredOutputsParams(json={"type": "null"}, param="a"), "auto")
    other = prepare(StructuredOutputsParams(json='{"type": "null"}', param="b"), "auto")
    assert one.key == other.key
    compact = StructuredOutputsParams(json={"type": "null"}, disable_any_whitespace=True)
    assert prepare(compact, "auto").key != one.key


def test_no_engine_is_imported() -> None:
    code = (
        "import sys; import llmserve.structured_output.prepare;"
        "sys.exit(', '.join({'torch', 'xgrammar', 'llguidance'} & {*sys.modules}) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bounded_strings_of_strict_tools() -> None:
    """xgrammar is narrower there than it could be, which is no reason to refuse."""
    schema = {"type": "string", "minLength": 2, "maxLength": 3}
    spec = _prepare("xgrammar", json=schema)
    assert spec.ignored == []
    grammar = compiled(spec)
    assert [n for n in range(6) if accepts_json(grammar, "é" * n)] == [2, 3]
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    assert _prepare(structural_tag=tag).ignored == []


def test_bounds_of_strings_are_dropped_where_a_style_has_none() -> None:
    """Or refused, where a schema is strict."""
    bounds = {"type": "string", "minLength": 2, "pattern": "^a"}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"minLength": bounds, "b": {"type": "array", "items": {"maxLength": 3}}},
    }
    part = {"type": "json_schema", "json_schema": schema, "style": "minimax_m3_xml"}
    params = StructuredOutputsParams(structural_tag={"format": part}, strict=False)
    spec = prepare(params, "auto")
    assert set(spec.ignored) >= {"#/properties/minLength/minLength"}
    assert "maxLength" not in spec.text and "pattern" not in spec.text
    assert compiled(spec) is not None
    schema["properties"] = {"d": {"type": "string", "format": "date"}}
    with pytest.raises(RequestError, match="#/properties/d/format .* in this model's format"):
        prepare(StructuredOutputsParams(structural_tag={"format": part}), "auto")
