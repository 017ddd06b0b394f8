# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Questions about schemas in the normal form that schema.py makes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import msgspec

from llmserve.structured_output.document import Node
from llmserve.structured_output.values import common, same_kind, unique

NEVER = False  # where no value fits
# What a schema may say that does not bound strings
_NOT_OF_STRINGS = frozenset(
    (
        "$defs", "$ref", "additionalProperties", "anyOf", "enum", "exclusiveMaximum",
        "exclusiveMinimum", "items", "maxItems", "maximum", "minItems", "minimum", "multipleOf",
        "prefixItems", "properties", "required", "type",
    )
)  # fmt: skip
_SCALARS = frozenset(("null", "boolean", "integer", "number"))
Schema = dict[str, Any]
Normal = Schema | bool  # only False, never True


class Merger(Protocol):
    """What the parts of a schema are made with. `exact` ones may allow more than the schema does,
    never less; all others may allow less, never more. `closed` ones close every object."""

    exact: bool
    closed: bool

    def normal(self, nodes: Iterable[Node]) -> Normal:
        """Of a value under all of `nodes`."""

    def seen(self, part: Normal) -> Normal:
        """What a reference points to, {} if it is still in the making."""

    def mark(self, nodes: list[Node], *keywords: str, weak: bool = True) -> None:
        """xgrammar would not do what these say; not `weak`: it only lets less through."""

    def drop(self, place: str, why: str = "") -> None:
        """No engine enforces the keyword at `place`."""

    def none(self, nodes: list[Node], *keywords: str) -> None:
        """No value fits; an error where one author wrote all that."""

    def tick(self) -> None:
        """Called often; raises when time is up."""


def visible(nodes: list[Node], node: Node) -> list[Node]:
    """Those of `nodes` that evaluate items and properties for `node`, itself among them."""
    return [n for n in nodes if n is node or node.owner in n.scopes]


def values_of(part: Normal, seen: Callable[[Normal], Normal]) -> list[Any] | None:
    """All values, if they are few."""
    part = seen(part)
    if isinstance(part, bool):
        return []
    if "enum" in part:
        values: list[Any] = part["enum"]
        return values
    if "anyOf" in part:
        parts = [values_of(option, seen) for option in part["anyOf"]]
        return None if None in parts else unique(v for own in parts for v in own or ())
    match part.get("type"):
        case "null":
            return [None]
        case "boolean":
            return [False, True]
        case "integer" if "minimum" in part and "maximum" in part and "multipleOf" not in part:
            low, high = int(part["minimum"]), int(part["maximum"])
            return list(range(low, high + 1)) if high - low < 16 else None
    return None


def is_small(schema: Schema | bool) -> bool:
    """Whether it costs no more than a reference to it."""
    return isinstance(schema, bool) or not schema.keys() & {
        "anyOf", "properties", "items", "enum", "patternProperties"
    }  # fmt: skip


def is_free(part: Schema) -> bool:
    """Whether it allows all values of its type."""
    return part == {"type": part.get("type")} or part in (
        {"type": "array", "items": {}},
        {"type": "object", "properties": {}, "required": [], "additionalProperties": {}},
    )


def are_disjoint(parts: list[Normal], tick: Callable[[], None]) -> bool:
    """Whether no value is valid under two of `parts`. `tick` is called often, and may raise."""
    alive = [part for part in parts if part is not NEVER]
    return all(_differ(a, b, tick) for a, b in itertools.combinations(alive, 2))


def _differ(a: Any, b: Any, tick: Callable[[], None]) -> bool:
    """Whether no value is valid under both; False where that is not obvious."""
    tick()
    for one, other in ((a, b), (b, a)):
        if "anyOf" in one:
            return all(_differ(part, other, tick) for part in one["anyOf"])
        if "enum" in one and "enum" not in other and "type" in other:
            return not any(same_kind(value, {other["type"]}) for value in one["enum"])
    if "enum" in a and "enum" in b:
        return not common(a["enum"], b["enum"])
    if "type" not in a or "type" not in b:
        return False
    if a["type"] != b["type"]:
        return {a["type"], b["type"]} != {"integer", "number"}
    if a["type"] != "object":
        return False
    shared = a["properties"].keys() & b["properties"].keys()
    both = {name for name in shared if name in a["required"] and name in b["required"]}
    if any(_differ(a["properties"][name], b["properties"][name], tick) for name in both):
        return True
    return any(
        one["additionalProperties"] is False and name not in one["properties"]
        and not one.get("patternProperties")
        for one, other in ((a, b), (b, a))
        for name in other["required"]
    )  # fmt: skip


def is_finite(schema: Any, defs: dict[str, Any]) -> bool:
    """Whether some value of finite length is valid: a recursion may never end."""
    done: set[str] = set()

    def ends(part: Any) -> bool:
        if isinstance(part, bool):
            return part
        if "$ref" in part:
            return part["$ref"].rpartition("/")[2] in done
        if "anyOf" in part:
            return any(map(ends, part["anyOf"]))
        if part.get("type") == "object":
            return all(ends(part["properties"].get(name, {})) for name in part["required"])
        if part.get("type") == "array" and part.get("minItems"):
            first = part.get("prefixItems", [])[: part["minItems"]]
            return all(map(ends, first)) and (part["minItems"] <= len(first) or ends(part["items"]))
        return True

    while True:
        more = {name for name, part in defs.items() if name not in done and ends(part)}
        if not more:
            return ends(schema)
        done |= more


def has_free_strings(schema: Any) -> bool:
    """Whether, under this schema in the normal form, what may come within a string that may hold
    any letter, and after it, does not depend on the letters that it holds already."""
    for part in _parts(schema):
        more, named = part.get("additionalProperties", False), part.get("properties", {})
        if not part.keys() <= _NOT_OF_STRINGS or (named and more is not False):
            return False  # a name that stands for itself, or is any other
        if sum(map(_may_hold_letters, part.get("anyOf", []))) > 1:
            return False
    return True


def num_properties(schema: Any) -> int:
    """That have a name, in all objects of this schema in the normal form."""
    return sum(len(part.get("properties", ())) for part in _parts(schema))


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and those in it."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, bool):
            continue
        yield part
        parts += [part.get("additionalProperties", False), part.get("items", False)]
        parts += [*part.get("properties", {}).values(), *part.get("prefixItems", ())]
        parts += [*part.get("anyOf", ()), *part.get("$defs", {}).values()]


def _may_hold_letters(option: Any) -> bool:
    if isinstance(option, bool):
        return False
    if "enum" in option:
        return any(isinstance(value, str | list | dict) for value in option["enum"])
    return option.get("type") not in _SCALARS


def dump(schema: Schema) -> str:
    """JSON text in the order in which the properties stand."""
    return msgspec.json.encode(schema).decode()
