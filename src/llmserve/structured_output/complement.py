# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a schema refuses, as schemas: for not, and for the other side of if."""

import json
from typing import Any

from llmserve.structured_output.document import TYPES, Document, Node

_MAX_OPTIONS = 16
_SAYS_NOTHING = frozenset({"title", "description", "default", "examples", "$comment"})


def complement(document: Document, node: Node, depth: int = 0) -> list[Node] | None:
    """Schemas of which at least one is valid exactly where `node` is not; None where that cannot
    be written down. `~not` in them lists single values that are refused.
    """
    document.check(node)
    raw = node.raw
    if isinstance(raw, bool):
        return [] if raw else [_made(node, {})]
    if depth > 8:
        return None
    options: list[Node] = []
    for keyword, value in raw.items():
        if keyword in _SAYS_NOTHING:
            continue
        part = _of_keyword(document, node, keyword, value, depth)
        if part is None:
            return None
        options += part
        if len(options) > _MAX_OPTIONS:
            return None
    return options


def _made(node: Node, raw: dict[str, Any]) -> Node:
    text = json.dumps(raw, default=lambda part: part.name)
    return Node(raw, node.pointer, node.base, f"{node.pointer}~{text}")


def _of_keyword(
    document: Document, node: Node, keyword: str, value: Any, depth: int
) -> list[Node] | None:
    match keyword:
        case "const":
            return [_made(node, {"~not": [value]})]
        case "enum":
            return [_made(node, {"~not": value})]
        case "type":
            own = set(value if isinstance(value, list) else [value])
            if "integer" in own and "number" not in own:
                return None  # a number that is no integer
            own |= {"integer"} if "number" in own else set()
            left = [name for name in TYPES if name not in own]
            return [_made(node, {"type": left})] if left else []
        case "required":
            return [_made(node, {"type": "object", "properties": {name: False}}) for name in value]
        case "properties":
            options = []
            for name in value:
                parts = complement(document, node.child("properties", name), depth + 1)
                if parts is None:
                    return None
                options += [
                    _made(node, {"type": "object", "required": [name], "properties": {name: part}})
                    for part in parts
                ]
            return options
        case "not":
            inner = node.child("not")  # made: what it names does not count as evaluated
            return [Node(inner.raw, inner.pointer, inner.base, f"{inner.name}~")]
        case "allOf":
            options = []
            for index in range(len(value)):
                parts = complement(document, node.child("allOf", index), depth + 1)
                if parts is None:
                    return None
                options += parts
            return options
        case "anyOf":
            every = [complement(document, node.child("anyOf", i), depth + 1)
                     for i in range(len(value))]  # fmt: skip
            if any(parts is None for parts in every):
                return None
            return [_made(node, {"allOf": [_any_of(node, parts or []) for parts in every]})]
        case "$ref":
            return complement(document, document.resolve(node, "$ref"), depth + 1)
    return _of_bound(node, keyword, value)


def _any_of(node: Node, parts: list[Node]) -> Node:
    return _made(node, {"anyOf": parts}) if parts else Node(False, node.pointer, node.base)


def _of_bound(node: Node, keyword: str, value: Any) -> list[Node] | None:
    """The other side of a bound, for values that it speaks of at all."""
    if isinstance(value, bool):
        return None
    flipped: dict[str, tuple[str, str, Any]] = {
        "minimum": ("number", "exclusiveMaximum", value),
        "exclusiveMinimum": ("number", "maximum", value),
        "maximum": ("number", "exclusiveMinimum", value),
        "exclusiveMaximum": ("number", "minimum", value),
    }
    if keyword in ("minLength", "minItems", "minProperties"):
        if value == 0:
            return []
        kind = {"L": "string", "I": "array", "P": "object"}[keyword[3]]
        return [_made(node, {"type": kind, f"max{keyword[3:]}": int(value) - 1})]
    if keyword in ("maxLength", "maxItems", "maxProperties"):
        kind = {"L": "string", "I": "array", "P": "object"}[keyword[3]]
        return [_made(node, {"type": kind, f"min{keyword[3:]}": int(value) + 1})]
    if keyword not in flipped:
        return None
    kind, opposite, bound = flipped[keyword]
    return [_made(node, {"type": kind, opposite: bound})]
