# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Text to JSON by schema."""

from typing import Any

import pytest

from llmserve.parsers.schema_values import is_text, to_json, types_of


@pytest.mark.parametrize(
    ("types", "text", "wanted"),
    [
        ((), "123", '"123"'),
        (("string",), "123", '"123"'),
        (("string", "null"), "null", "null"),
        (("string", "null"), "nil", '"nil"'),
        (("integer", "string"), "5", "5"),
        (("integer",), " -5\n", "-5"),
        (("integer",), "5.5", "5.5"),
        (("integer",), "007", '"007"'),
        (("integer",), "9" * 5000, "9" * 5000),
        (("number",), "1e5", "1e5"),
        (("number",), "nan", '"nan"'),
        (("boolean",), "True", "true"),
        (("boolean",), "yes", '"yes"'),
        (("object",), '{"a":1}', '{"a": 1}'),
        (("object",), "[1]", '"[1]"'),
        (("array", "string"), "[1,2]", "[1, 2]"),
        (("array",), "[1", '"[1"'),
        (("array",), "[" * 100000, '"' + "[" * 100000 + '"'),
    ],
)
def test_the_first_type_that_fits(types: tuple[str, ...], text: str, wanted: str) -> None:
    assert to_json(text, frozenset(types)) == wanted


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "integer"}, {"integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, {"array", "null"}),
        ({"enum": [1, "a", None, True]}, {"integer", "string", "null", "boolean"}),
        ({"enum": [1.5, [], {}]}, {"number", "array", "object"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"properties": {}}, {"object"}),
        ({}, set()),
        (5, set()),
        ({"type": 5}, set()),
    ],
)  # fmt: skip
def test_types_of_a_schema(schema: Any, types: set[str]) -> None:
    assert types_of({"properties": {"k": schema}}, "k") == types
    assert types_of({"properties": {"k": schema}}, "other") == frozenset()


def test_only_strings_are_text() -> None:
    assert is_text(frozenset()) and is_text(frozenset({"string"}))
    assert not is_text(frozenset({"string", "null"}))


def test_a_schema_that_never_ends_is_left() -> None:
    schema: dict[str, Any] = {}
    schema["anyOf"] = [schema]
    assert types_of({"properties": {"k": schema}}, "k") == frozenset()
