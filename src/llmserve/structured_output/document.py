# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A JSON schema as its author wrote it: its places, its references, and whether it is well formed.

Drafts 4 to 2020-12 are read alike; a keyword that was renamed is known under both names.
"""

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from llmserve.errors import GrammarError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_DEPTH = 128  # of arrays and objects in each other
MAX_PLACES = 50_000
_DATA = ("enum", "const", "default", "examples", "example")  # values, no schemas in them
_REAL = int | float


class Node:
    """One schema at its place. `plain` leaves out what offers a choice (anyOf and the like).

    Two nodes with equal `name` are the same schema. In a `made` one, which nobody wrote, a Node
    may stand in `raw` wherever a schema may. All that applies beside a `top` one is part of it.
    """

    __slots__ = ("base", "made", "name", "plain", "pointer", "raw", "top")

    def __init__(
        self, raw: Any, pointer: str, base: str, made: str = "", *, plain: bool = False
    ) -> None:
        self.raw = raw
        self.pointer = pointer
        self.base = base
        self.made = bool(made)
        self.name = made or pointer
        self.plain = plain
        self.top = False

    def child(self, *path: str | int) -> "Node":
        """The schema under `path`."""
        value = self.raw
        for step in path:
            value = value[step]
        if isinstance(value, Node):
            return value
        steps = "".join(f"/{escape(str(step))}" for step in path)
        base = self.base
        if isinstance(value, dict) and isinstance(value.get("$id"), str):
            base = urljoin(base, value["$id"])
        made = f"{self.name}{steps}" if self.made else ""
        return Node(value, self.pointer + steps, base, made)

    def as_plain(self, top: bool) -> "Node":
        """The same without its choices."""
        if self.plain:
            return self
        node = Node(self.raw, self.pointer, self.base, plain=True)
        node.made, node.name, node.top = self.made, f"{self.name}~{'!' * top}", top
        return node


class Document:
    """Finds what references point to. GrammarError, with a JSON pointer, for what is malformed."""

    def __init__(self, schema: Any) -> None:
        self._resources: dict[str, Node] = {}
        self._anchors: dict[tuple[str, str], Node] = {}
        self.root = Node(schema, "#", "")
        if isinstance(schema, dict) and isinstance(schema.get("$id"), str):
            self.root.base = schema["$id"]
        self._resources[""] = self._resources[urldefrag(self.root.base)[0]] = self.root
        self._num_places = 0
        self._walk(self.root, 0)
        self._checked: set[str] = set()

    def _walk(self, node: Node, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise GrammarError(f"the schema is nested more than {MAX_DEPTH} levels deep")
        self._num_places += 1
        if self._num_places > MAX_PLACES:
            raise GrammarError(f"the schema has more than {MAX_PLACES} arrays and objects")
        raw = node.raw
        if isinstance(raw, list):
            for index in range(len(raw)):
                self._walk(node.child(index), depth + 1)
        if not isinstance(raw, dict):
            return
        if isinstance(raw.get("$id"), str):
            self._resources.setdefault(urldefrag(node.base)[0], node)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(raw.get(keyword), str):
                self._anchors.setdefault((urldefrag(node.base)[0], raw[keyword]), node)
        for keyword, value in raw.items():
            if isinstance(value, dict | list) and keyword not in _DATA:
                self._walk(node.child(keyword), depth + 1)

    def is_dynamic(self, node: Node) -> bool:
        """Whether its $dynamicRef may mean different schemas at different times."""
        name = str(node.raw["$dynamicRef"]).rpartition("#")[2]
        return sum(name == anchor for _, anchor in self._anchors) > 1

    def resolve(self, node: Node, keyword: str) -> Node:
        """What the reference in `keyword` of `node` points to."""
        ref = node.raw[keyword]
        place = f"{node.pointer}/{keyword}"
        if not isinstance(ref, str):
            raise GrammarError(f"{place} must be a string")
        uri, fragment = urldefrag(urljoin(node.base, ref))
        target = self._resources.get(uri)
        if target is None:
            raise GrammarError(f"{place}: {ref[:200]!r} is not in the schema itself")
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get((uri, fragment))
            if found is None:
                raise GrammarError(f"{place}: there is no anchor {fragment[:200]!r}")
            return found
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            value = target.raw
            if isinstance(value, dict) and step in value:
                target = target.child(step)
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                target = target.child(int(step))
            else:
                raise GrammarError(f"{place}: {ref[:200]!r} points to nothing")
        return target

    def check(self, node: Node) -> None:
        """Whether every keyword has a value that it can have."""
        if node.name in self._checked or isinstance(node.raw, bool):
            return
        self._checked.add(node.name)
        if not isinstance(node.raw, dict):
            raise GrammarError(f"{node.pointer} must be a schema, an object or a boolean")
        for keyword, value in node.raw.items():
            wanted = _SHAPES.get(keyword)
            if wanted is not None and not wanted[1](value):
                raise GrammarError(f"{node.pointer}/{escape(keyword)} must be {wanted[0]}")


def escape(step: str) -> str:
    """One step of a JSON pointer."""
    return step.replace("~", "~0").replace("/", "~1")


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool | Node)


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, _REAL)
        and not isinstance(value, bool)
        and value >= 0
        and math.isfinite(value)
        and int(value) == value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, _REAL) and not isinstance(value, bool) and math.isfinite(value)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_schema_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and name in TYPES for name in names)


_Shape = tuple[str, Callable[[Any], bool]]
_STRING: _Shape = ("a string", lambda value: isinstance(value, str))
_COUNT: _Shape = ("a number of things, 0 or more", _is_count)
_NUMBER: _Shape = ("a number", _is_number)
_SCHEMA: _Shape = ("a schema", _is_schema)
_SCHEMAS: _Shape = ("an array of one or more schemas", _is_schemas)
_SCHEMA_MAP: _Shape = ("an object whose values are schemas", _is_schema_map)
_NAMES: _Shape = ("an array of strings", _is_names)
_SHAPES: dict[str, _Shape] = {
    "type": (f"one or more of {', '.join(TYPES)}", _is_type),
    "enum": ("an array of one or more values", lambda v: isinstance(v, list) and bool(v)),
    "$ref": _STRING, "$dynamicRef": _STRING, "pattern": _STRING, "format": _STRING,
    "minLength": _COUNT, "maxLength": _COUNT, "minItems": _COUNT, "maxItems": _COUNT,
    "minProperties": _COUNT, "maxProperties": _COUNT, "minContains": _COUNT,
    "maxContains": _COUNT, "minimum": _NUMBER, "maximum": _NUMBER,
    "exclusiveMinimum": ("a number", lambda v: isinstance(v, bool) or _is_number(v)),
    "exclusiveMaximum": ("a number", lambda v: isinstance(v, bool) or _is_number(v)),
    "multipleOf": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "uniqueItems": ("a boolean", lambda v: isinstance(v, bool)),
    "required": _NAMES, "allOf": _SCHEMAS, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS,
    "prefixItems": _SCHEMAS, "not": _SCHEMA, "if": _SCHEMA, "then": _SCHEMA, "else": _SCHEMA,
    "additionalProperties": _SCHEMA, "additionalItems": _SCHEMA, "propertyNames": _SCHEMA,
    "contains": _SCHEMA, "unevaluatedItems": _SCHEMA, "unevaluatedProperties": _SCHEMA,
    "items": (
        "a schema",
        lambda v: _is_schema(v) or (isinstance(v, list) and all(map(_is_schema, v))),
    ),
    "properties": _SCHEMA_MAP, "patternProperties": _SCHEMA_MAP, "dependentSchemas": _SCHEMA_MAP,
    "dependentRequired": (
        "an object of arrays of strings",
        lambda v: isinstance(v, dict) and all(map(_is_names, v.values())),
    ),
    "dependencies": (
        "an object of schemas or arrays of strings",
        lambda v: isinstance(v, dict) and all(_is_schema(x) or _is_names(x) for x in v.values()),
    ),
}  # fmt: skip
