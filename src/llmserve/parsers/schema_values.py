# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Argument values that a model writes as plain text, given the type that their schema says."""

import re
from collections.abc import Mapping
from typing import Any

from llmserve.parsers.json_text import dumps, loads

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
TEXT = frozenset({"string"})
_TYPES = {"object": dict, "array": list}


def types_of(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The JSON types that argument `name` may have; empty where the schema does not say."""
    properties = schema.get("properties")
    own = properties.get(name) if isinstance(properties, Mapping) else None
    return frozenset(_types(own, 0))


def _types(schema: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth > 4:
        return set()
    named = schema.get("type")
    if isinstance(named, str):
        found = {named}
    elif isinstance(named, list):
        found = {name for name in named if isinstance(name, str)}
    else:
        found = set()
        for key in ("anyOf", "oneOf", "allOf"):
            options = schema.get(key)
            for option in options if isinstance(options, list) else ():
                found |= _types(option, depth + 1)
        if not found and isinstance(schema.get("enum"), list):
            found = {_type_name(value) for value in schema["enum"]}
        if not found and ("properties" in schema or "$ref" in schema):
            found = {"object"} if "properties" in schema else {"object", "array", "string"}
    return found | ({"null"} if schema.get("nullable") is True else set())


def _type_name(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) else "number"
    return next((name for name, kind in _TYPES.items() if isinstance(value, kind)), "string")


def is_text(types: frozenset[str]) -> bool:
    """Whether every text is a string, so that it may stream."""
    return types <= TEXT


def to_json(text: str, types: frozenset[str]) -> str:
    """The JSON of `text`: the first of null, integer, number, boolean, object, array that is
    allowed and fits, else a string."""
    word = text.strip()
    if "null" in types and word.lower() in ("null", "none"):
        return "null"
    if "integer" in types and _INTEGER.fullmatch(word):
        return word
    if ("number" in types or "integer" in types) and _NUMBER.fullmatch(word):
        return word
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    value = loads(word) if types & _TYPES.keys() else None
    if any(kind in types and isinstance(value, _TYPES[kind]) for kind in _TYPES):
        return dumps(value)
    return dumps(text)
