# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A JSON schema as its author wrote it: its places, its references, and whether it is well formed.

Drafts 4 to 2020-12 are read alike; a keyword that was renamed is known under both names.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import msgspec

from llmserve.errors import GrammarError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
MAX_DEPTH = 128  # of arrays and objects in each other
MAX_PLACES = 50_000
_LONG = 256  # characters of a name
_DATA = ("enum", "const", "default", "examples", "example")  # values, no schemas in them
_OWNERS = ("unevaluatedItems", "unevaluatedProperties")
_REAL = int | float

Environment = tuple[tuple[str, str], ...]  # dynamic anchor -> URI of the outermost resource with it


class Node:
    """One schema at its place.

    Two nodes with equal `name` are the same schema. `plain` leaves out what offers a choice (anyOf
    and the like); `written` is False where nobody wrote it. `scopes` are the `owner` names of the
    schemas around it, for the same value, that have unevaluatedItems or unevaluatedProperties: what
    it speaks of is evaluated for them. A Node may stand in `raw` wherever a schema may, where
    nobody wrote that schema.
    """

    __slots__ = (
        "base", "document", "environment", "ident", "plain", "pointer", "raw", "scopes", "written"
    )  # fmt: skip

    def __init__(
        self,
        document: "Document",
        raw: Any,
        pointer: str,
        base: str = "",
        *,
        ident: str = "",
        environment: Environment = (),
        scopes: frozenset[str] = frozenset(),
        plain: bool = False,
        written: bool = True,
    ) -> None:
        self.document = document
        self.raw = raw
        self.pointer = pointer
        self.base = base
        self.ident = ident or pointer
        self.environment = environment
        self.scopes = scopes
        self.plain = plain
        self.written = written

    @property
    def owner(self) -> str:
        """The same for all places from which the schema is looked at."""
        return f"{self.ident}{self.environment or ''}"

    @property
    def name(self) -> str:
        """Of the schema and all that it depends on."""
        scopes = "|".join(sorted(self.scopes))
        return f"{self.owner}{'^' * bool(scopes)}{scopes}{'~' * self.plain}"

    def child(self, *path: str | int) -> "Node":
        """The schema under `path`, for another value."""
        value = self.raw
        for step in path:
            value = value[step]
        if isinstance(value, Node):
            return value
        steps = "".join(f"/{escape(str(step))}" for step in path)
        base, environment = self.base, self.environment
        if isinstance(value, dict) and isinstance(value.get("$id"), str):
            base = join(base, value["$id"])
            environment = self.document.enter(environment, base)
        return Node(
            self.document,
            value,
            self.pointer + steps,
            base,
            ident=self.ident + steps,
            environment=environment,
            written=self.written,
        )

    def beside(self, *path: str | int) -> "Node":
        """The schema under `path`, for the same value."""
        return self.beneath(self.child(*path))

    def beneath(self, other: "Node") -> "Node":
        """`other`, applied by this one to the same value."""
        own = any(keyword in self.raw for keyword in _OWNERS)
        scopes = self.scopes | {self.owner} if own else self.scopes
        return other.changed(scopes=other.scopes | scopes) if scopes else other

    def as_plain(self) -> "Node":
        """The same without its choices."""
        return self.changed(plain=True)

    def changed(self, **fields: Any) -> "Node":
        """A copy in which some fields differ."""
        names = ("ident", "environment", "scopes", "plain", "written")
        own = {name: getattr(self, name) for name in names}
        return Node(self.document, self.raw, self.pointer, self.base, **(own | fields))

    def made(self, raw: dict[str, Any] | bool) -> "Node":
        """A schema that nobody wrote, in place of this one."""
        text = msgspec.json.encode(raw, enc_hook=lambda part: part.name).decode()
        ident = f"{self.owner}~{text}"
        if len(ident) > _LONG:  # it holds those of its parts, which hold those of theirs
            ident = hashlib.blake2b(ident.encode(), digest_size=16).hexdigest()
        return Node(self.document, raw, self.pointer, self.base, ident=ident, written=False)


class Document:
    """Finds what references point to. GrammarError, with a JSON pointer, for what is malformed.

    `known` gives the document behind a URI, or None; nothing is fetched.
    """

    def __init__(self, schema: Any, known: Callable[[str], Any] = lambda uri: None) -> None:
        self._resources: dict[str, Node] = {}
        self._anchors: dict[tuple[str, str], Node] = {}
        self._dynamic: dict[str, dict[str, Node]] = {}  # anchor -> URI -> where it is
        self._checked: set[str] = set()
        self._num_places = 0
        self._wanted: list[str] = []
        self.root = self._read(schema, "#", "")
        while self._wanted:
            uri = self._wanted.pop()
            if uri not in self._resources and (found := known(uri)) is not None:
                self._read(found, f"{uri}#", uri)
        self._dynamic = {name: places for name, places in self._dynamic.items() if len(places) > 1}
        self.root.environment = self.enter((), self.root.base)

    def _read(self, schema: Any, pointer: str, uri: str) -> Node:
        node = Node(self, schema, pointer, uri)
        if isinstance(schema, dict) and isinstance(schema.get("$id"), str):
            node.base = join(uri, schema["$id"])
        self._resources[uri] = self._resources[urldefrag(node.base)[0]] = node
        self._walk(node, 0)
        return node

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
        uri = urldefrag(node.base)[0]
        if isinstance(raw.get("$id"), str):
            self._resources.setdefault(uri, node)
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(raw.get(keyword), str):
                self._anchors.setdefault((uri, raw[keyword]), node)
        if isinstance(raw.get("$dynamicAnchor"), str):
            self._dynamic.setdefault(raw["$dynamicAnchor"], {}).setdefault(uri, node)
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(raw.get(keyword), str):
                self._wanted.append(urldefrag(join(node.base, raw[keyword]))[0])
        for keyword, value in raw.items():
            if isinstance(value, dict | list) and keyword not in _DATA:
                self._walk(node.child(keyword), depth + 1)

    def enter(self, environment: Environment, base: str) -> Environment:
        """Of a schema in the resource `base`, reached from one with `environment`."""
        uri, known = urldefrag(base)[0], dict(environment)
        more = [(name, uri) for name, places in self._dynamic.items()
                if uri in places and name not in known]  # fmt: skip
        return environment + tuple(more)

    def resolve(self, node: Node, keyword: str) -> Node:
        """What the reference in `keyword` of `node` points to."""
        ref = node.raw[keyword]
        place = f"{node.pointer}/{keyword}"
        if not isinstance(ref, str):
            raise GrammarError(f"{place} must be a string")
        uri, fragment = urldefrag(join(node.base, ref))
        target = self._resources.get(uri)
        if target is None:
            raise GrammarError(f"{place}: {ref[:200]!r} is not in the schema itself")
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            found = self._anchors.get((uri, fragment))
            if found is None:
                raise GrammarError(f"{place}: there is no anchor {fragment[:200]!r}")
            places = self._dynamic.get(fragment, {})
            if keyword == "$dynamicRef" and uri in places:
                found = places[dict(node.environment).get(fragment, uri)]
            target, fragment = found, ""
        for step in fragment.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            value = target.raw
            if isinstance(value, dict) and step in value:
                target = target.child(step)
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                target = target.child(int(step))
            else:
                raise GrammarError(f"{place}: {ref[:200]!r} points to nothing")
        return target.changed(environment=self.enter(node.environment, target.base))

    def check(self, node: Node) -> None:
        """Whether every keyword has a value that it can have."""
        if node.ident in self._checked or isinstance(node.raw, bool):
            return
        self._checked.add(node.ident)
        if not isinstance(node.raw, dict):
            raise GrammarError(f"{node.pointer} must be a schema, an object or a boolean")
        for keyword, value in node.raw.items():
            wanted = _SHAPES.get(keyword)
            if wanted is not None and not wanted[1](value):
                raise GrammarError(f"{node.pointer}/{escape(keyword)} must be {wanted[0]}")


def join(base: str, ref: str) -> str:
    """`ref` as it is meant where `base` is; also where that is a URN."""
    return urldefrag(base)[0] + ref if ref.startswith("#") else urljoin(base, ref)


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
ASSERTIONS = frozenset({"const", *_SHAPES})
