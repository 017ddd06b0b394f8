# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a schema refuses, as schemas: for not, oneOf, and the other side of if."""

import itertools
from collections.abc import Iterable
from typing import Any

from llmserve.structured_output.document import ASSERTIONS, TYPES, Node
from llmserve.structured_output.values import same_kind

_MAX_OPTIONS = 64
_MAX_DEPTH = 8
_FLIPPED = {
    "minimum": "exclusiveMaximum",
    "exclusiveMinimum": "maximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMaximum": "minimum",
}
_SIZED = {"Length": "string", "Items": "array", "Properties": "object"}


class Complement:
    """`options` are schemas that no value fits which fits `node`. `exact` if they leave out no
    value that does not fit it; `~not` in them lists single values that are refused, `~unlike` a
    pattern.
    """

    def __init__(self, node: Node, depth: int = 0) -> None:
        self.options: list[Node] = []
        self.exact = True
        self._node = node
        self._depth = depth
        node.document.check(node)
        if isinstance(node.raw, bool):
            self._add({}) if node.raw is False else None
            return
        if depth > _MAX_DEPTH:
            self.exact = False
            return
        for keyword in node.raw:
            if keyword in ASSERTIONS:
                self._refuse(keyword, node.raw[keyword])
        if len(self.options) > _MAX_OPTIONS:
            self.exact = False
            del self.options[_MAX_OPTIONS:]

    def _add(self, raw: dict[str, Any]) -> None:
        self.options.append(self._node.made(raw))

    def _of(self, *path: str | int) -> list[Node]:
        """What the schema under `path` refuses."""
        return self._without(self._node.child(*path))

    def _without(self, node: Node) -> list[Node]:
        other = Complement(node, self._depth + 1)
        self.exact &= other.exact
        return other.options

    def _any(self, options: list[Node]) -> Node:
        if len(options) == 1:
            return options[0]
        return self._node.made({"anyOf": options} if options else False)

    def _refuse(self, keyword: str, value: Any) -> None:
        match keyword:
            case "const":
                self._values([value])
            case "enum":
                self._values(value)
            case "type":
                self._types(value if isinstance(value, list) else [value])
            case "pattern":
                self._add({"type": "string", "~unlike": [value]})
            case "not":
                self.options.append(self._node.child("not"))
            case "$ref" | "$dynamicRef":
                self.options += self._without(self._node.document.resolve(self._node, keyword))
            case "allOf":
                for index in range(len(value)):
                    self.options += self._of("allOf", index)
            case "anyOf":
                every = [self._any(self._of("anyOf", i)) for i in range(len(value))]
                self._add({"allOf": every})
            case "oneOf":
                self._one_of(len(value))
            case "if":
                self._conditional()
            case "then" | "else" | "minContains" | "maxContains":
                pass  # with if and contains
            case _ if keyword in _FLIPPED:
                self._bound(keyword, value)
            case _ if keyword[:3] in ("min", "max") and keyword[3:] in _SIZED:
                self._size(keyword, int(value))
            case _:
                self._of_parts(keyword, value)

    def _values(self, values: list[Any]) -> None:
        refused: list[Node] = []
        for value in values:
            if isinstance(value, list | dict):
                refused.append(self._any(self._other_than(value)))
        scalars = [value for value in values if not isinstance(value, list | dict)]
        if scalars:
            refused.append(self._node.made({"~not": scalars}))
        self._add({"allOf": refused})

    def _other_than(self, value: Any) -> list[Node]:
        """Everything but one array or object."""
        node = self._node
        made = [node.made({"type": [name for name in TYPES if not same_kind(value, {name})]})]
        if isinstance(value, list):
            made.append(node.made({"type": "array", "minItems": len(value) + 1}))
            if value:
                made.append(node.made({"type": "array", "maxItems": len(value) - 1}))
            for i, item in enumerate(value):
                other = self._any(self._without(node.made({"const": item})))
                made.append(self._at(i, other))
            return made
        made.append(node.made({"type": "object", "minProperties": len(value) + 1}))
        for name, item in value.items():
            other = self._any(self._without(node.made({"const": item})))
            made.append(node.made({"type": "object", "properties": {name: False}}))
            made.append(node.made(_with(name, other)))
        return made

    def _at(self, index: int, item: Node) -> Node:
        """An array with that item there."""
        prefix = [*itertools.repeat(True, index), item]
        return self._node.made({"type": "array", "minItems": index + 1, "prefixItems": prefix})

    def _types(self, names: list[str]) -> None:
        own = set(names)
        if "number" in own:
            own.add("integer")
        elif "integer" in own:
            own.add("number")  # a number that is no integer is not told from one that is
            self.exact = False
        if left := [name for name in TYPES if name not in own]:
            self._add({"type": left})

    def _one_of(self, count: int) -> None:
        opposites = [self._any(self._of("oneOf", i)) for i in range(count)]
        self._add({"allOf": opposites})
        for i, j in itertools.combinations(range(count), 2):
            self._add({"allOf": [self._node.child("oneOf", k) for k in (i, j)]})

    def _conditional(self) -> None:
        condition, raw = self._node.child("if"), self._node.raw
        if "then" in raw:
            self.options += [self._node.made({"allOf": [condition, other]})
                             for other in self._of("then")]  # fmt: skip
        if "else" in raw:
            pairs = itertools.product(self._of("if"), self._of("else"))
            self.options += [self._node.made({"allOf": list(pair)}) for pair in pairs]

    def _bound(self, keyword: str, value: Any) -> None:
        if isinstance(value, bool):  # draft 4's
            self.exact = False
        else:
            self._add({"type": "number", _FLIPPED[keyword]: value})

    def _size(self, keyword: str, value: int) -> None:
        side, what = keyword[:3], keyword[3:]
        if side == "max":
            self._add({"type": _SIZED[what], f"min{what}": value + 1})
        elif value > 0:
            self._add({"type": _SIZED[what], f"max{what}": value - 1})

    def _of_parts(self, keyword: str, value: Any) -> None:
        """Keywords that speak of items and properties."""
        node, raw = self._node, self._node.raw
        match keyword:
            case "required":
                for name in value:
                    self._add({"type": "object", "properties": {name: False}})
            case "properties":
                for name in value:
                    for other in self._of(keyword, name):
                        self._add(_with(name, other))
            case "additionalProperties":
                self._additional()
            case "patternProperties":  # an object that has only such names
                for pattern in value:
                    if others := self._of(keyword, pattern):
                        self._add({"type": "object", "minProperties": 1,
                                   "propertyNames": {"pattern": pattern},
                                   keyword: {pattern: self._any(others)}})  # fmt: skip
                self.exact = False
            case "propertyNames":
                if names := self._of(keyword):
                    self._add(
                        {"type": "object", "minProperties": 1, "propertyNames": self._any(names)}
                    )
                self.exact = False
            case "dependentRequired" | "dependentSchemas" | "dependencies":
                for name, needed in value.items():
                    if isinstance(needed, list):
                        for other in needed:
                            self._add({"type": "object", "required": [name],
                                       "properties": {other: False}})  # fmt: skip
                    else:
                        present = node.made({"type": "object", "required": [name]})
                        for option in self._of(keyword, name):
                            self._add({"allOf": [present, option]})
            case "prefixItems":
                self._prefix(keyword)
            case "items" if isinstance(value, list):
                self._prefix(keyword)
            case "items":
                first = len(raw.get("prefixItems", ()))
                for other in self._of(keyword):
                    self.options.append(self._at(first, other))
                self.exact = False
            case "contains":
                self._contains()
            case _:  # multipleOf, uniqueItems, format and what only annotations tell
                self.exact = False

    def _prefix(self, keyword: str) -> None:
        for index in range(len(self._node.raw[keyword])):
            self.options += [self._at(index, other) for other in self._of(keyword, index)]

    def _contains(self) -> None:
        node, raw = self._node, self._node.raw
        least = raw.get("minContains", 1)
        if least:
            other = self._any(self._of("contains"))
            self._add({"type": "array", "items": other})
            self.exact &= least == 1
        if "maxContains" in raw:
            more = {"contains": node.child("contains"), "minContains": raw["maxContains"] + 1}
            self._add({"type": "array", **more})

    def _additional(self) -> None:
        """An object that has only such properties, and one of them is wrong."""
        raw = self._node.raw
        named: dict[str, Any] = {name: False for name in raw.get("properties", ())}
        unlike: Iterable[str] = raw.get("patternProperties", ())
        if other := self._of("additionalProperties"):
            made = {
                "type": "object",
                "minProperties": 1,
                "properties": named,
                "patternProperties": {pattern: False for pattern in unlike},
                "additionalProperties": self._any(other),
            }
            self._add({key: part for key, part in made.items() if part != {}})
        self.exact = False


def _with(name: str, schema: Node) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: schema}}
