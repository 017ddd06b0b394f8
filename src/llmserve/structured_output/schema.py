# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""JSON schemas in one normal form, so that both grammar engines give them one meaning.

Schemas that apply to the same value (allOf, references with siblings, a base beside anyOf) are
merged into one, choices are moved outwards, and every leaf gets one type. What then is left is
little, and of each piece it is known which engine enforces it. An object that names properties is
closed unless additionalProperties says otherwise; one that names none is open.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from llmserve.errors import GrammarError
from llmserve.structured_output.arrays import array_of
from llmserve.structured_output.complement import Complement
from llmserve.structured_output.document import TYPES, Document, Node, escape
from llmserve.structured_output.normal_form import (
    NEVER,
    Normal,
    Schema,
    are_disjoint,
    is_finite,
    is_free,
    is_small,
)
from llmserve.structured_output.objects import object_of
from llmserve.structured_output.regular import matches
from llmserve.structured_output.scalars import numbers_of, strings_of
from llmserve.structured_output.values import common, same_kind, scalar_fits, unique, without

MAX_WHITESPACE = 16  # characters in a row between two JSON tokens
MAX_CHOICES = 256  # ways to choose among the alternatives that meet at one place
MAX_NODES = 20_000
MAX_SECONDS = 0.3  # of a core, so that nobody's schema is refused because others are at work
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": (
        "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems",
        "contains", "minContains", "maxContains", "unevaluatedItems",
    ),
    "object": (
        "properties", "patternProperties", "additionalProperties", "required", "minProperties",
        "maxProperties", "propertyNames", "unevaluatedProperties",
    ),
}  # fmt: skip


class OutOfTime(GrammarError):
    """More was to be done than there was time for."""


class Normalizer:
    """One schema's way to the normal form.

    `hard` are pointers to keywords that xgrammar would not enforce as they are meant, `weak` to
    those of them that it would let too much through for, `ignored` to those that no engine
    enforces. With `strict` the first of the latter is a GrammarError.
    """

    def __init__(
        self,
        schema: Any,
        *,
        strict: bool,
        closed: bool = False,
        known: Callable[[str], Any] = lambda uri: None,
        exact_of: Document | None = None,
        seconds: float = MAX_SECONDS,
    ) -> None:
        self.hard: list[str] = []
        self.weak: list[str] = []
        self.ignored: list[str] = []
        self._deadline = time.thread_time() + seconds
        self._strict = strict
        self.closed = closed
        self._document = exact_of or Document(schema, known)
        # What JSON schema itself says a schema allows, which may be more than is allowed here
        self.exact = exact_of is not None
        self._others: Normalizer | None = None
        self._memo: dict[tuple[str, ...], Normal | None] = {}  # None: in the making
        self._names: dict[tuple[str, ...], str] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._num_nodes = 0

    def run(self) -> Schema:
        """The whole schema; GrammarError where no value can fit it."""
        root = self.normal((self._document.root,))
        defs = {name: self._memo[key] for key, name in self._names.items()}
        if root is NEVER or not is_finite(root, defs):
            raise GrammarError("no value can be valid under #")
        assert isinstance(root, dict)
        for name, schema in defs.items():
            if schema is NEVER or not is_finite(schema, defs):
                raise GrammarError(f"no value can be valid under a part of the schema ({name})")
        return root | {"$defs": defs} if defs else root

    def tick(self) -> None:
        """OutOfTime once the time is up."""
        if time.thread_time() > self._deadline:
            raise OutOfTime("the schema takes too long to write out")

    # -- schemas that apply to one value

    def normal(self, nodes: Iterable[Node]) -> Normal:
        """Of a value under all of `nodes`; a reference where it is there already, and not small."""
        nodes = tuple({node.name: node for node in nodes}.values())
        if not nodes:
            return {}
        key = tuple(node.name for node in nodes)
        if key in self._memo:
            done = self._memo[key]
            if done is NEVER or (done is not None and is_small(done)):
                return done
            name = self._names.setdefault(key, f"d{len(self._names)}")
            self._keys[name] = key
            return {"$ref": f"#/$defs/{name}"}
        self._num_nodes += 1
        self.tick()
        if self._num_nodes > MAX_NODES:
            raise GrammarError(f"the schema has more than {MAX_NODES} parts once it is written out")
        self._memo[key] = None
        self._memo[key] = result = self._merge(nodes)
        return result

    def _merge(self, nodes: tuple[Node, ...]) -> Normal:
        flat, groups = self._expand(nodes)
        if flat is None:
            return NEVER
        if len(flat) == 1 and not groups and flat != list(nodes) and not flat[0].plain:
            return self.normal((flat[0],))  # a reference alone: share what it points to
        if not groups:
            return self._flatten(flat)
        if math.prod(len(group.options) for group in groups) > MAX_CHOICES:
            raise GrammarError(
                f"{groups[0].place}: more than {MAX_CHOICES} combinations of alternatives"
            )
        plain = tuple(node.as_plain() for node in flat)
        options: list[Schema] = []
        for choice in itertools.product(*(group.options for group in groups)):
            part = self.normal((*plain, *itertools.chain(*choice)))
            if part is not NEVER and part not in options:
                assert isinstance(part, dict)
                options.append(part)
        if len(options) < 2:
            return options[0] if options else NEVER
        return {} if {} in options else {"anyOf": options}

    def _exclusive(self, place: str, options: list[Node], base: Node) -> "_Choice":
        """Exactly one of `options`, of values that `base` allows."""
        choice = _Choice(place, [(option,) for option in options])
        if self.exact:  # asked only what cannot be: at least one is a safe answer
            return choice
        if self._others is None:
            self._others = Normalizer(None, strict=False, exact_of=self._document)
            self._others._deadline = self._deadline
        others = self._others
        parts = [others.seen(others.normal((base.as_plain(), option))) for option in options]
        if are_disjoint(parts, self.tick):
            return choice
        opposites = [Complement(option) for option in options]
        found: list[tuple[Node, ...]] = []
        for i, option in enumerate(options):
            rest = []
            for j, other in enumerate(opposites):
                if i == j or are_disjoint([parts[i], parts[j]], self.tick):
                    continue
                if not other.options and not other.exact:
                    self.drop(place, "its alternatives are not told apart")
                    return choice
                rest.append(other.options)
            if math.prod(map(len, rest)) > MAX_CHOICES:
                raise GrammarError(f"{place}: its alternatives overlap in too many ways")
            found += [(option, *chosen) for chosen in itertools.product(*rest)]
        return _Choice(place, found)

    def seen(self, part: Normal) -> Normal:
        """What a reference points to; {} where that is still in the making."""
        while isinstance(part, dict) and "$ref" in part:
            made = self._memo[self._keys[part["$ref"].rpartition("/")[2]]]
            if made is None:
                return {}
            part = made
        return part

    def _expand(self, nodes: tuple[Node, ...]) -> tuple[list[Node] | None, "list[_Choice]"]:
        """Everything that applies, and the choices among the rest; None if nothing can fit."""
        flat: dict[str, Node] = {}
        groups: dict[str, list[_Choice]] = {}
        scopes: dict[str, frozenset[str]] = {}
        todo = list(nodes)
        while todo:
            node = todo.pop(0)
            if node.raw is True or node.raw == {}:
                continue
            if node.raw is False:
                return None, []
            name = f"{node.owner}{'~' * node.plain}"
            if name in scopes:
                if node.scopes <= scopes[name]:
                    continue
                node = node.changed(scopes=node.scopes | scopes[name])
            scopes[name] = node.scopes
            self._document.check(node)
            raw, more = node.raw, list[Node]()
            if not node.plain:
                for keyword in ("$ref", "$dynamicRef"):
                    if keyword in raw:
                        more.append(node.beneath(self._document.resolve(node, keyword)))
                more += [node.beside("allOf", i) for i in range(len(raw.get("allOf", ())))]
                groups[name] = self._choices(node)
            if not raw.keys().isdisjoint(_FLAT):
                flat[name] = node
            todo = more + todo
        return list(flat.values()), list(itertools.chain(*groups.values()))

    def _choices(self, node: Node) -> "list[_Choice]":
        raw, groups = node.raw, list[_Choice]()
        for keyword in ("anyOf", "oneOf"):
            if keyword in raw:
                options = [node.beside(keyword, i) for i in range(len(raw[keyword]))]
                place = f"{node.pointer}/{keyword}"
                if keyword == "oneOf" and len(options) > 1:
                    groups.append(self._exclusive(place, options, node))
                else:
                    groups.append(_Choice(place, [(option,) for option in options]))
        if "if" in raw and ("then" in raw or "else" in raw or node.beside("if").scopes):
            met = [node.beside(k) for k in ("if", "then") if k in raw]
            unmet = [node.beside("else")] if "else" in raw else []
            self._add_negation(groups, node, "if", [tuple(met)], unmet)
        if "not" in raw:
            self._add_negation(groups, node, "not", [], [])
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name in raw.get(keyword, ()):
                place = f"{node.pointer}/{keyword}/{escape(name)}"
                absent = node.made({"properties": {name: False}})
                value = raw[keyword][name]
                names = [name, *value] if isinstance(value, list) else [name]
                present = node.made({"type": "object", "required": names})
                rest = () if isinstance(value, list) else (node.beside(keyword, name),)
                groups.append(_Choice(place, [(absent,), (present, *rest)]))
        return groups

    def _add_negation(
        self,
        groups: "list[_Choice]",
        node: Node,
        keyword: str,
        options: list[tuple[Node, ...]],
        rest: list[Node],
    ) -> None:
        """The choice between `options` and everything that the schema in `keyword` refuses."""
        place = f"{node.pointer}/{keyword}"
        opposite = Complement(node.child(keyword))
        if not opposite.exact and (self.exact or not opposite.options):
            self.drop(place, "it cannot be turned into what is allowed instead")
            return
        groups.append(_Choice(place, options + [(other, *rest) for other in opposite.options]))

    # -- what applies, without choices

    def _flatten(self, nodes: list[Node]) -> Normal:
        if not nodes:
            return {}
        raws = [node.raw for node in nodes]
        types = _types(raws)
        if len(types) == len(TYPES) and not self.exact:
            # Who names properties means an object, though the schema allows anything else too
            spoken = {kind for kind, words in _KEYWORDS.items() for raw in raws
                      if not raw.keys().isdisjoint(words)}  # fmt: skip
            types = spoken or types
        values = _enum(raws)
        excluded = [value for raw in raws for value in raw.get("~not", ())]
        if values is not None:
            fits = [v for v in without(values, excluded) if same_kind(v, types)]
            return self._enum_of(fits, nodes)
        parts: list[Schema] = []
        for kind in TYPES:
            if kind in types and not (kind == "integer" and "number" in types):
                parts += self._of_type(kind, nodes, excluded)
        if len(parts) == len(TYPES) - 1 and all(is_free(part) for part in parts):
            return {}
        if not parts:
            return NEVER
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _enum_of(self, values: list[Any], nodes: list[Node]) -> Normal:
        kept = [v for v in values if all(self._scalar_fits(v, node) for node in nodes)]
        for node in nodes:
            for kind, python in (("array", list), ("object", dict)):
                if any(isinstance(v, python) for v in kept):
                    for keyword in _KEYWORDS[kind]:
                        if keyword in node.raw:
                            self.drop(f"{node.pointer}/{keyword}", "beside enum or const")
        return {"enum": unique(kept)} if kept else NEVER

    def _scalar_fits(self, value: Any, node: Node) -> bool:
        if not scalar_fits(value, node.raw):
            return False
        if not isinstance(value, str):
            return True
        try:
            return ("pattern" not in node.raw or matches(node.raw["pattern"], value)) and not any(
                matches(pattern, value) for pattern in node.raw.get("~unlike", ())
            )
        except GrammarError as error:
            self.drop(f"{node.pointer}/pattern", error.message)
            return True

    def _of_type(self, kind: str, nodes: list[Node], excluded: list[Any]) -> list[Schema]:
        match kind:
            case "integer" | "number":
                return numbers_of(self, kind, nodes)
            case "string":
                strings = strings_of(self, nodes)
                return [] if strings is None else [strings]
            case "array":
                return array_of(self, nodes)
            case "object":
                objects = object_of(self, nodes)
                return [] if objects is None else [objects]
        if not any(same_kind(value, {kind}) for value in excluded):
            return [{"type": kind}]
        left = without([False, True], excluded) if kind == "boolean" else []
        return [{"enum": left}] if left else []

    # -- notes

    def mark(self, nodes: list[Node], *keywords: str, weak: bool = True) -> None:
        """xgrammar would not do what these say; not `weak`: it lets less through, as strings of
        bounded length without escapes."""
        found = [f"{n.pointer}/{k}" for n in nodes for k in keywords if k in n.raw]
        self.hard += found or [nodes[0].pointer]
        if weak:
            self.weak += found or [nodes[0].pointer]

    def drop(self, place: str, why: str = "") -> None:
        """No engine enforces the keyword at `place`."""
        if self._strict:
            raise GrammarError(f"{place} cannot be enforced{f': {why}' if why else ''}")
        if place not in self.ignored:
            self.ignored.append(place)

    def none(self, nodes: list[Node], *keywords: str) -> None:
        """No value fits; whoever wrote that within one schema did not mean it."""
        if len(nodes) == 1 and nodes[0].written and not self.exact:
            words = [word for word in keywords if word in nodes[0].raw] or keywords
            raise GrammarError(f"{nodes[0].pointer}: no value fits {' and '.join(words)}")


class _Choice:
    """At `place`, all schemas of one of `options` apply."""

    def __init__(self, place: str, options: list[tuple[Node, ...]]) -> None:
        self.place = place
        self.options = options


_FLAT = frozenset({"type", "enum", "const", "~not", "~unlike"}.union(*_KEYWORDS.values()))


def _types(raws: list[Schema]) -> set[str]:
    left = set(TYPES)
    for raw in raws:
        if "type" in raw:
            own = raw["type"] if isinstance(raw["type"], list) else [raw["type"]]
            left &= {*own, "integer"} if "number" in own else set(own)
    return left


def _enum(raws: list[Schema]) -> list[Any] | None:
    values: list[Any] | None = None
    for raw in raws:
        for keyword in ("enum", "const"):
            if keyword in raw:
                own = raw["enum"] if keyword == "enum" else [raw["const"]]
                values = own if values is None else common(values, own)
    return values
