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
from typing import Any

from llmserve.errors import GrammarError
from llmserve.structured_output.complement import complement
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
from llmserve.structured_output.regex import ascii_classes
from llmserve.structured_output.values import common, same_kind, scalar_fits, unique, without

MAX_WHITESPACE = 16  # characters in a row between two JSON tokens
MAX_CHOICES = 256  # ways to choose among the alternatives that meet at one place
MAX_NODES = 20_000
MAX_SECONDS = 1.0  # of a thread of the API server
_MAX_CONTAINED = 64
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)  # fmt: skip
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


class Normalizer:
    """One schema's way to the normal form.

    `hard` are pointers to keywords that xgrammar would not enforce as they are meant, `ignored`
    to those that no engine enforces. With `strict` the first of the latter is a GrammarError.
    """

    def __init__(
        self,
        schema: Any,
        *,
        strict: bool,
        closed: bool = False,
        exact_of: Document | None = None,
    ) -> None:
        self.hard: list[str] = []
        self.ignored: list[str] = []
        self._strict = strict
        self._closed = closed
        self._document = exact_of or Document(schema)
        # What JSON schema itself says a schema allows, which may be more than is allowed here
        self._exact = exact_of is not None
        self._others: Normalizer | None = None
        self._memo: dict[tuple[str, ...], Normal | None] = {}  # None: in the making
        self._names: dict[tuple[str, ...], str] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        self._num_nodes = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def run(self) -> Schema:
        """The whole schema; GrammarError where no value can fit it."""
        root = self._normal((self._document.root,))
        defs = {name: self._memo[key] for key, name in self._names.items()}
        if root is NEVER or not is_finite(root, defs):
            raise GrammarError("no value can be valid under #")
        assert isinstance(root, dict)
        for name, schema in defs.items():
            if schema is NEVER or not is_finite(schema, defs):
                raise GrammarError(f"no value can be valid under a part of the schema ({name})")
        return root | {"$defs": defs} if defs else root

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise GrammarError("the schema takes too long to write out")

    # -- schemas that apply to one value

    def _normal(self, nodes: tuple[Node, ...]) -> Normal:
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
        self._check_time()
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
            return self._normal((flat[0],))  # a reference alone: share what it points to
        alone = len(nodes) == 1
        tops = [node.as_plain(True) if alone and node is nodes[0] else node for node in flat]
        if not groups:
            return self._flatten(tops)
        if math.prod(len(group.options) for group in groups) > MAX_CHOICES:
            raise GrammarError(
                f"{groups[0].place}: more than {MAX_CHOICES} combinations of alternatives"
            )
        plain = tuple(node.as_plain(False) for node in tops)
        options: list[Schema] = []
        for choice in itertools.product(*(group.options for group in groups)):
            part = self._normal((*plain, *itertools.chain(*choice)))
            if part is not NEVER and part not in options:
                assert isinstance(part, dict)
                options.append(part)
        if len(options) < 2:
            return options[0] if options else NEVER
        return {} if {} in options else {"anyOf": options}

    def _exclusive(self, place: str, options: list[Node], base: list[Node]) -> "_Choice":
        """Exactly one of `options`, of values that all of `base` allow."""
        if self._exact:  # asked only what cannot be: at least one is a safe answer
            return _Choice(place, [(option,) for option in options])
        if self._others is None:
            self._others = Normalizer(None, strict=False, exact_of=self._document)
        others = self._others
        plain = [node.as_plain(False) for node in base]
        parts = [others._seen(others._normal((*plain, option))) for option in options]
        if are_disjoint(parts, self._check_time):
            return _Choice(place, [(option,) for option in options])
        opposites = [complement(self._document, option) for option in options]
        if any(opposite is None for opposite in opposites):
            self._drop(place, "its alternatives are not told apart")
            return _Choice(place, [(option,) for option in options])
        found: list[tuple[Node, ...]] = []
        for i, option in enumerate(options):
            rest = [opposite or [] for j, opposite in enumerate(opposites) if j != i]
            if math.prod(map(len, rest)) > MAX_CHOICES:
                raise GrammarError(f"{place}: its alternatives overlap in too many ways")
            found += [(option, *choice) for choice in itertools.product(*rest)]
        return _Choice(place, found)

    def _seen(self, part: Normal) -> Normal:
        """What a reference points to, as far as it is made."""
        while isinstance(part, dict) and "$ref" in part:
            made = self._memo[self._keys[part["$ref"].rpartition("/")[2]]]
            if made is None:
                return {}
            part = made
        return part

    def _expand(self, nodes: tuple[Node, ...]) -> tuple[list[Node] | None, "list[_Choice]"]:
        """Everything that applies, and the choices among the rest; None if nothing can fit."""
        flat: list[Node] = []
        groups: list[_Choice] = []
        todo, seen = list(nodes), set[str]()
        while todo:
            node = todo.pop(0)
            if node.name in seen or node.raw is True or node.raw == {}:
                continue
            if node.raw is False:
                return None, []
            seen.add(node.name)
            self._document.check(node)
            raw, more = node.raw, list[Node]()
            if not node.plain:
                for keyword in ("$ref", "$dynamicRef"):
                    if keyword in raw:
                        if keyword == "$dynamicRef" and self._document.is_dynamic(node):
                            self._drop(f"{node.pointer}/{keyword}", "it means several schemas")
                        more.append(self._document.resolve(node, keyword))
                more += [node.child("allOf", i) for i in range(len(raw.get("allOf", ())))]
                groups += self._choices(node)
            if not raw.keys().isdisjoint(_FLAT):
                flat.append(node)
            todo = more + todo
        return flat, groups

    def _choices(self, node: Node) -> "list[_Choice]":
        raw, groups = node.raw, list[_Choice]()
        for keyword in ("anyOf", "oneOf"):
            if keyword in raw:
                options = [node.child(keyword, i) for i in range(len(raw[keyword]))]
                place = f"{node.pointer}/{keyword}"
                if keyword == "oneOf" and len(options) > 1:
                    groups.append(self._exclusive(place, options, [node]))
                else:
                    groups.append(_Choice(place, [(option,) for option in options]))
        if "if" in raw and ("then" in raw or "else" in raw):
            met = [node.child(k) for k in ("if", "then") if k in raw]
            unmet = [node.child("else")] if "else" in raw else []
            self._add_negation(groups, node, "if", [tuple(met)], unmet)
        if "not" in raw:
            self._add_negation(groups, node, "not", [], [])
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name in raw.get(keyword, ()):
                place = f"{node.pointer}/{keyword}/{escape(name)}"
                absent = Node({"properties": {name: False}}, place, "", f"{place}~absent")
                value = raw[keyword][name]
                names = [name, *value] if isinstance(value, list) else [name]
                present = Node({"type": "object", "required": names}, place, "", f"{place}~present")
                rest = () if isinstance(value, list) else (node.child(keyword, name),)
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
        opposite = complement(self._document, node.child(keyword))
        if opposite is None:
            self._drop(place, "it cannot be turned into what is allowed instead")
            return
        groups.append(_Choice(place, options + [(other, *rest) for other in opposite]))

    # -- what applies, without choices

    def _flatten(self, nodes: list[Node]) -> Normal:
        if not nodes:
            return {}
        raws = [node.raw for node in nodes]
        types = _types(raws)
        if len(types) == len(TYPES) and not self._exact:
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
            if kind not in types or (kind == "integer" and "number" in types):
                continue
            if others := [v for v in excluded if same_kind(v, {kind})]:
                if kind == "boolean":
                    left = without([False, True], others)
                    parts += [{"enum": left}] if left else []
                    continue
                if kind == "null":
                    continue
                self._drop(f"{nodes[0].pointer}/not", "single values cannot be left out")
            part = self._of_type(kind, nodes)
            if part is not None:
                parts.append(part)
        if len(parts) == len(TYPES) - 1 and all(is_free(part) for part in parts):
            return {}
        if not parts:
            return NEVER
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _enum_of(self, values: list[Any], nodes: list[Node]) -> Normal:
        kept = [v for v in values if all(scalar_fits(v, node.raw) for node in nodes)]
        for node in nodes:
            for kind, python in (("string", str), ("array", list), ("object", dict)):
                if any(isinstance(v, python) for v in kept):
                    for keyword in _KEYWORDS[kind]:
                        if keyword in node.raw and keyword not in ("minLength", "maxLength"):
                            if keyword == "format":
                                continue
                            self._drop(f"{node.pointer}/{keyword}", "beside enum or const")
        return {"enum": unique(kept)} if kept else NEVER

    def _of_type(self, kind: str, nodes: list[Node]) -> Schema | None:
        match kind:
            case "integer" | "number":
                return self._number(kind, nodes)
            case "string":
                return self._string(nodes)
            case "array":
                return self._array(nodes)
            case "object":
                return self._object(nodes)
        return {"type": kind}

    def _number(self, kind: str, nodes: list[Node]) -> Schema | None:
        result: Schema = {"type": kind}
        low, low_open = -math.inf, False
        high, high_open = math.inf, False
        for node in nodes:
            raw = node.raw
            for keyword, opened in _BOUNDS:
                bounds = []
                if keyword in raw:
                    bounds.append((raw[keyword], raw.get(opened) is True))  # draft 4's boolean
                if opened in raw and not isinstance(raw[opened], bool):
                    bounds.append((raw[opened], True))
                for bound, is_open in bounds:
                    if keyword == "minimum" and (bound, is_open) > (low, low_open):
                        low, low_open = bound, is_open
                    if keyword == "maximum" and (-bound, is_open) > (-high, high_open):
                        high, high_open = bound, is_open
        if low > high or (low == high and (low_open or high_open)):
            return self._none(nodes, "minimum", "maximum")
        if kind == "integer":
            if low > -math.inf:
                low, low_open = math.floor(low) + 1 if low_open else math.ceil(low), False
            if high < math.inf:
                high, high_open = math.ceil(high) - 1 if high_open else math.floor(high), False
            if low > high:
                return self._none(nodes, "minimum", "maximum")
        if low > -math.inf:
            result["exclusiveMinimum" if low_open else "minimum"] = low
        if high < math.inf:
            result["exclusiveMaximum" if high_open else "maximum"] = high
        factors = [(n, n.raw["multipleOf"]) for n in nodes if "multipleOf" in n.raw]
        if factors:
            self.hard += [f"{node.pointer}/multipleOf" for node, _ in factors]
            whole = [int(value) for _, value in factors if value == int(value)]
            if len(whole) == len(factors):
                result["multipleOf"] = math.lcm(*whole)
            else:
                result["multipleOf"] = factors[0][1]
                for node, value in factors[1:]:
                    if value != factors[0][1]:
                        self._drop(f"{node.pointer}/multipleOf", "beside another one")
        return result

    def _string(self, nodes: list[Node]) -> Schema | None:
        result: Schema = {"type": "string"}
        low = max((int(node.raw.get("minLength", 0)) for node in nodes), default=0)
        high = min((node.raw.get("maxLength", math.inf) for node in nodes), default=math.inf)
        if low > high:
            return self._none(nodes, "minLength", "maxLength")
        if low:
            result["minLength"] = low
        if high < math.inf:
            result["maxLength"] = int(high)
        patterns = list(
            dict.fromkeys(ascii_classes(n.raw["pattern"]) for n in nodes if "pattern" in n.raw)
        )
        formats = {f: n for n in nodes if (f := n.raw.get("format")) in FORMATS}
        if patterns:
            result["pattern"] = patterns[0]
        if formats:
            result["format"] = next(iter(formats))
            for other in list(formats)[1:]:
                self._drop(f"{formats[other].pointer}/format", "beside another one")
        if len(result) > (2 if formats else 1):
            self._mark(nodes, "minLength", "maxLength", "pattern")
        if len(patterns) > 1:
            return {"allOf": [result, *({"type": "string", "pattern": p} for p in patterns[1:])]}
        return result

    def _array(self, nodes: list[Node]) -> Schema | None:
        low = max((int(node.raw.get("minItems", 0)) for node in nodes), default=0)
        high = min((node.raw.get("maxItems", math.inf) for node in nodes), default=math.inf)
        first = [self._contained(node) for node in nodes if "contains" in node.raw]
        low = max([low, *map(len, first)])
        length = max([len(_prefix(node)) for node in nodes] + [len(items) for items in first] + [0])
        prefix: list[Schema] = []
        for index in range(length):
            parts = [part for node in nodes if (part := self._item(nodes, node, index)) is not None]
            parts += [items[index] for items in first if index < len(items)]
            item = self._normal(tuple(parts))
            if item is NEVER:
                high = min(high, index)
                break
            assert isinstance(item, dict)
            prefix.append(item)
        last = [part for node in nodes if (part := self._item(nodes, node, length)) is not None]
        rest: Normal = self._normal(tuple(last))
        for node in nodes:
            if "maxContains" in node.raw and "contains" in node.raw:
                high = min(high, node.raw["maxContains"])  # fewer than may be, but no more
            if node.raw.get("uniqueItems") is True and high > 1:
                self._drop(f"{node.pointer}/uniqueItems")
        if rest is NEVER:
            high = min(high, len(prefix))
        if low > high:
            return self._none(nodes, "minItems", "maxItems")
        result: Schema = {"type": "array"}
        if high <= len(prefix):
            prefix, rest = prefix[: int(high)], NEVER
        if prefix:
            result["prefixItems"] = prefix
            self._mark(nodes, "prefixItems", "items")
        result["items"] = rest
        if low:
            result["minItems"] = low
        if high < math.inf:
            result["maxItems"] = int(high)
        return result

    def _contained(self, node: Node) -> list[Node]:
        """The first items of an array that begins with what it has to contain."""
        count = int(node.raw.get("minContains", 1))
        if count > _MAX_CONTAINED:
            self._drop(f"{node.pointer}/minContains", f"it is more than {_MAX_CONTAINED}")
        return [node.child("contains")] * min(count, _MAX_CONTAINED)

    def _item(self, nodes: list[Node], node: Node, index: int) -> Node | None:
        """What `node` says of the item at `index`."""
        prefix, raw = _prefix(node), node.raw
        if index < len(prefix):
            return prefix[index]
        keyword = "additionalItems" if isinstance(raw.get("items"), list) else "items"
        if keyword in raw:
            return node.child(keyword)
        if "unevaluatedItems" not in raw or not self._sees_all(nodes, node, "unevaluatedItems"):
            return None
        for other in nodes:
            held = other.raw.get("minContains", 1) if "contains" in other.raw else 0
            if "items" in other.raw or index < max(len(_prefix(other)), held):
                return None
        return node.child("unevaluatedItems")

    def _sees_all(self, nodes: list[Node], node: Node, keyword: str) -> bool:
        """Whether what `keyword` of `node` calls unevaluated is what none of `nodes` speaks of."""
        if (len(nodes) == 1 or node.top) and not any(other.made for other in nodes):
            return True
        self._drop(f"{node.pointer}/{keyword}", "beside other schemas")
        return False

    # -- objects

    def _object(self, nodes: list[Node]) -> Schema | None:
        names = list(dict.fromkeys(k for n in nodes for k in n.raw.get("properties", ())))
        required = list(dict.fromkeys(k for n in nodes for k in n.raw.get("required", ())))
        patterns = list(dict.fromkeys(k for n in nodes for k in n.raw.get("patternProperties", ())))
        spelled = self._normal(
            tuple(node.child("propertyNames") for node in nodes if "propertyNames" in node.raw)
        )
        if isinstance(spelled, dict) and "enum" in spelled and not names and not patterns:
            names = [name for name in spelled["enum"] if isinstance(name, str)]
        names += [name for name in required if name not in names]
        rest = self._rest(nodes, bool(names or patterns))
        properties: dict[str, Any] = {}
        for name in names:
            parts = [p for n in nodes if (p := self._property(nodes, n, name)) is not None]
            value = self._normal(tuple(parts)) if _spells(spelled, name) else NEVER
            if value is not NEVER:
                properties[name] = value
            elif name in required:
                return None
            elif rest is not NEVER or patterns:
                properties[name] = False
        by_pattern: dict[str, Any] = {}
        for pattern in patterns:
            found = [n.child("patternProperties", pattern) for n in nodes
                     if pattern in n.raw.get("patternProperties", ())]  # fmt: skip
            by_pattern[ascii_classes(pattern)] = self._normal(tuple(found))
        if rest is not NEVER or by_pattern:
            rest = self._spell(nodes, spelled, rest, by_pattern)
        low = max((int(n.raw.get("minProperties", 0)) for n in nodes), default=0)
        high = min((n.raw.get("maxProperties", math.inf) for n in nodes), default=math.inf)
        low = max(low, len(required))
        is_closed = rest is NEVER and not by_pattern
        if low > high or (is_closed and low > len(properties)):
            return self._none(nodes, "minProperties", "maxProperties")
        result: Schema = {"type": "object", "properties": properties, "required": required}
        if by_pattern:
            result["patternProperties"] = by_pattern
            self._mark(nodes, "patternProperties", "propertyNames")
        result["additionalProperties"] = rest
        if low > len(required):
            result["minProperties"] = low
            self._mark(nodes, "minProperties")
        if high < math.inf and (not is_closed or high < len(properties)):
            result["maxProperties"] = int(high)
            self._mark(nodes, "maxProperties")
        if properties and not is_closed:
            self._mark(nodes, "additionalProperties", "properties")
        return result

    def _property(self, nodes: list[Node], node: Node, name: str) -> Node | None:
        """What `node` says of the property `name`, patterns aside."""
        raw = node.raw
        if name in raw.get("properties", ()):
            return node.child("properties", name)
        if raw.get("patternProperties"):
            return None  # which the engine applies to names too
        if "additionalProperties" in raw:
            return node.child("additionalProperties")
        keyword = "unevaluatedProperties"
        if keyword not in raw or not self._sees_all(nodes, node, keyword):
            return None
        for other in nodes:
            if name in other.raw.get("properties", ()) or not other.raw.keys().isdisjoint(
                ("additionalProperties", "patternProperties")
            ):
                return None
        return node.child(keyword)

    def _rest(self, nodes: list[Node], names_some: bool) -> Normal:
        """What a property that nobody names must be."""
        if self._closed and names_some:
            return NEVER
        keyword = "additionalProperties"
        found = [n.child(keyword) for n in nodes if keyword in n.raw]
        if not found:
            keyword = "unevaluatedProperties"
            found = [n.child(keyword) for n in nodes
                     if keyword in n.raw and self._sees_all(nodes, n, keyword)]  # fmt: skip
        if not found and names_some and not self._exact:
            return NEVER
        return self._normal(tuple(found))

    def _spell(
        self, nodes: list[Node], spelled: Normal, rest: Normal, by_pattern: dict[str, Any]
    ) -> Normal:
        """`rest` where names must be `spelled` some way; it may move into `by_pattern`."""
        if spelled is NEVER:
            return NEVER
        assert isinstance(spelled, dict)
        if spelled in ({}, {"type": "string"}):
            return rest
        if "enum" in spelled and not by_pattern:
            return NEVER
        pattern = spelled.get("pattern")
        if spelled.keys() <= {"type", "minLength", "maxLength"}:
            low, high = spelled.get("minLength", 0), spelled.get("maxLength", "")
            pattern = rf"^[\s\S]{{{low},{high}}}$"
        elif spelled.keys() != {"type", "pattern"}:
            pattern = None
        if pattern is None or by_pattern or rest is NEVER:
            place = next(n.pointer for n in nodes if "propertyNames" in n.raw)
            self._drop(f"{place}/propertyNames")
            return rest
        by_pattern[pattern] = rest
        return NEVER

    # -- notes

    def _mark(self, nodes: list[Node], *keywords: str) -> None:
        """xgrammar would not do what these say."""
        found = [f"{n.pointer}/{k}" for n in nodes for k in keywords if k in n.raw]
        self.hard += found or [nodes[0].pointer]

    def _drop(self, place: str, why: str = "") -> None:
        """No engine enforces the keyword at `place`."""
        if self._strict:
            raise GrammarError(f"{place} cannot be enforced{f': {why}' if why else ''}")
        if place not in self.ignored:
            self.ignored.append(place)

    def _none(self, nodes: list[Node], *keywords: str) -> Schema | None:
        """No value fits; whoever wrote that within one schema did not mean it."""
        if len(nodes) == 1:
            raise GrammarError(f"{nodes[0].pointer}: no value fits {' and '.join(keywords)}")
        return None


_BOUNDS = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))


class _Choice:
    """At `place`, all schemas of one of `options` apply."""

    def __init__(self, place: str, options: list[tuple[Node, ...]]) -> None:
        self.place = place
        self.options = options


_FLAT = frozenset({"type", "enum", "const", "~not", *itertools.chain(*_KEYWORDS.values())})


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


def _prefix(node: Node) -> list[Node]:
    """The schemas of an array's first items."""
    keyword = "items" if isinstance(node.raw.get("items"), list) else "prefixItems"
    return [node.child(keyword, i) for i in range(len(node.raw.get(keyword, ())))]


def _spells(spelled: Normal, name: str) -> bool:
    """Whether a property may have this name; patterns are left to the engine."""
    if isinstance(spelled, bool):
        return spelled
    if "enum" in spelled:
        return name in spelled["enum"]
    return scalar_fits(name, spelled)
