# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Objects in the normal form."""

import itertools
import math
import re
from typing import Any

from llmserve.errors import GrammarError
from llmserve.structured_output.document import Node
from llmserve.structured_output.normal_form import NEVER, Merger, Normal, Schema, visible
from llmserve.structured_output.regex import ascii_classes
from llmserve.structured_output.regular import combine, matches
from llmserve.structured_output.scalars import FORMATS, enforceable

_MAX_PATTERNS = 5  # that may overlap
_Spelling = list[list[str]]  # a name matches all patterns of one of these


def object_of(merger: Merger, nodes: list[Node]) -> Schema | None:
    """The objects under all of `nodes`."""
    return _Object(merger, nodes).result()


class _Object:
    def __init__(self, merger: Merger, nodes: list[Node]) -> None:
        self.merger = merger
        self.nodes = nodes
        self.patterns = enforceable(
            merger,
            (
                (pattern, self._place("patternProperties"))
                for node in nodes
                for pattern in node.raw.get("patternProperties", ())
            ),
        )
        self.required = list(dict.fromkeys(k for n in nodes for k in n.raw.get("required", ())))
        spelled = [n.child("propertyNames") for n in nodes if "propertyNames" in n.raw]
        self.spelling = self._spelling(merger.normal(spelled)) if spelled else None

    def result(self) -> Schema | None:
        nodes, merger = self.nodes, self.merger
        names = list(dict.fromkeys(k for n in nodes for k in n.raw.get("properties", ())))
        names_some = any(
            n.written and (n.raw.get("properties") or n.raw.get("patternProperties")) for n in nodes
        )
        if isinstance(self.spelling, dict):
            names_some = True
            if not names and not self.patterns:
                names = list(self.spelling)
        names += [name for name in self.required if name not in names]
        rest = self._rest(bool(names_some))
        by_pattern: dict[str, Any] = {}
        if self.patterns or self.spelling is not None:
            rest = self._by_patterns(by_pattern, rest)
        properties: dict[str, Any] = {}
        for name in names:
            value = merger.normal(self._about(name)) if self._is_spelled(name) else NEVER
            if value is not NEVER:
                properties[name] = value
            elif name in self.required:
                return None
            elif rest is not NEVER or by_pattern:
                properties[name] = False
        low = max((int(n.raw.get("minProperties", 0)) for n in nodes), default=0)
        high = min((n.raw.get("maxProperties", math.inf) for n in nodes), default=math.inf)
        low = max(low, len(self.required))
        is_closed = rest is NEVER and not by_pattern
        if low > high or (is_closed and low > len(properties)):
            merger.none(nodes, "minProperties", "maxProperties")
            return None
        result: Schema = {
            "type": "object", "properties": properties, "required": self.required,
        }  # fmt: skip
        if by_pattern:
            result["patternProperties"] = by_pattern
            merger.mark(nodes, "patternProperties", "propertyNames")
        result["additionalProperties"] = rest
        if low > len(self.required):
            result["minProperties"] = low
            merger.mark(nodes, "minProperties")
        if high < math.inf and (not is_closed or high < len(properties)):
            result["maxProperties"] = int(high)
            merger.mark(nodes, "maxProperties")
        if properties and not is_closed:
            merger.mark(nodes, "additionalProperties", "properties")
        return result

    def _matched(self, name: str) -> set[str]:
        found = set[str]()
        for pattern in self.patterns:
            try:
                if matches(pattern, name):
                    found.add(pattern)
            except GrammarError as error:
                self.merger.drop(self._place("patternProperties"), error.message)
        return found

    def _place(self, keyword: str) -> str:
        return next(f"{n.pointer}/{keyword}" for n in self.nodes if keyword in n.raw)

    def _about(self, name: str) -> list[Node]:
        """All that is said of the property `name`."""
        return self._said(self._matched(name), name)

    def _said(self, matched: set[str], name: str | None = None) -> list[Node]:
        """Of the property `name` or one that nobody names, which matches these patterns alone."""
        found: list[Node] = []
        for node in self.nodes:
            raw = node.raw
            keyword = "patternProperties"
            own = [node.child(keyword, p) for p in raw.get(keyword, ()) if p in matched]
            if name is not None and name in raw.get("properties", ()):
                own.append(node.child("properties", name))
            if not own and "additionalProperties" in raw:
                own.append(node.child("additionalProperties"))
            elif (
                not own
                and "unevaluatedProperties" in raw
                and not self._is_seen(node, matched, name)
            ):
                own.append(node.child("unevaluatedProperties"))
            found += own
        return found

    def _is_seen(self, node: Node, matched: set[str], name: str | None) -> bool:
        """Whether such a property is evaluated before unevaluatedProperties of `node` is asked."""
        return self.merger.exact or any(
            "additionalProperties" in other.raw
            or name in other.raw.get("properties", ())
            or not matched.isdisjoint(other.raw.get("patternProperties", ()))
            or ("unevaluatedProperties" in other.raw and other is not node)
            for other in visible(self.nodes, node)
        )

    def _rest(self, names_some: bool) -> Normal:
        """What a property that nobody names and no pattern matches must be."""
        if self.merger.closed and names_some:
            return NEVER
        found = self._said(set())
        if not found and names_some and not self.merger.exact:
            return NEVER
        return self.merger.normal(found)

    # -- names

    def _spelling(self, spelled: Normal) -> "dict[str, None] | _Spelling | None":
        """What propertyNames says: these names, or such ones; None if it says nothing."""
        spelled = self.merger.seen(spelled)
        if isinstance(spelled, bool):
            return {}
        if "enum" in spelled:
            return {name: None for name in spelled["enum"] if isinstance(name, str)}
        options: _Spelling = []
        for part in spelled.get("anyOf", [spelled]):
            part = self.merger.seen(part)
            if part == {} or part == {"type": "string"}:
                return None
            patterns = _patterns_of(part)
            if patterns is None:
                self.merger.drop(self._place("propertyNames"))
                return None
            options += [patterns] if patterns else []
        return options if options else {}

    def _is_spelled(self, name: str) -> bool:
        if self.spelling is None:
            return True
        if isinstance(self.spelling, dict):
            return name in self.spelling
        try:
            return any(all(matches(p, name) for p in option) for option in self.spelling)
        except GrammarError as error:
            self.merger.drop(self._place("propertyNames"), error.message)
            return True

    def _by_patterns(self, by_pattern: dict[str, Any], rest: Normal) -> Normal:
        """Fills in disjoint patterns; returns what is left of `rest`."""
        normal, spelling = self.merger.normal, self.spelling
        if isinstance(spelling, dict):
            return NEVER  # its names are properties
        if spelling is None and len(self.patterns) == 1:
            (pattern,) = self.patterns
            by_pattern[ascii_classes(pattern)] = normal(self._said({pattern}))
            return rest
        if not self.patterns and spelling is not None and len(spelling) == len(spelling[0]) == 1:
            if rest is not NEVER:
                by_pattern[ascii_classes(spelling[0][0])] = rest
            return NEVER
        place = self._place("patternProperties" if self.patterns else "propertyNames")
        if len(self.patterns) > _MAX_PATTERNS:
            self.merger.drop(place, f"more than {_MAX_PATTERNS} patterns may overlap")
            return rest
        flags = [frozenset(chosen) for count in range(len(self.patterns) + 1)
                 for chosen in itertools.combinations(self.patterns, count)]  # fmt: skip
        for chosen in flags:
            if not chosen and spelling is None:
                continue
            value = normal(self._said(set(chosen))) if chosen else rest
            only = self._only(chosen, place)
            if only is not None and (value is not NEVER or chosen):
                by_pattern[only] = value
        return rest if spelling is None else NEVER

    def _only(self, chosen: frozenset[str], place: str) -> str | None:
        """A pattern of the names that match these patterns, no others, and are spelled right."""
        spelling = self.spelling or []
        assert isinstance(spelling, list)
        patterns = list(dict.fromkeys(self.patterns + [p for option in spelling for p in option]))

        def wanted(found: list[bool]) -> bool:
            flags = dict(zip(patterns, found, strict=True))
            return all(flags[p] == (p in chosen) for p in self.patterns) and (
                not spelling or any(all(flags[p] for p in option) for option in spelling)
            )

        try:
            return combine(patterns, wanted, self.merger.tick)
        except GrammarError as error:
            self.merger.drop(place, error.message)
            return None


def _patterns_of(part: Normal) -> list[str] | None:
    """Of a string's schema; [] for what is no string's, None for what cannot be told."""
    if not isinstance(part, dict):
        return []
    if "allOf" in part:
        every = [_patterns_of(own) for own in part["allOf"]]
        return None if None in every else [p for own in every for p in own or ()]
    if "enum" in part:
        names = [re.escape(v) for v in part["enum"] if isinstance(v, str)]
        return [f"^(?:{'|'.join(names)})$"] if names else []
    if part.get("type") != "string":
        return [] if "type" in part else None
    found = [part["pattern"]] if "pattern" in part else []
    if "format" in part:
        found.append(FORMATS[part["format"]])
    if "minLength" in part or "maxLength" in part:
        low, high = part.get("minLength", 0), part.get("maxLength", "")
        found.append(rf"^[\s\S]{{{low},{high}}}$")
    return found or [""]
