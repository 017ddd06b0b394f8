# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Arguments in literals that are not JSON, from a JSON schema, as a grammar in EBNF.

Engines know schemas as JSON alone. What is known here is types, properties, items and their bounds,
enum, const, anyOf, oneOf, and references inside the schema; the rest is named by `unbound`.
Objects with properties are closed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

Style = Literal["python", "gemma", "functiongemma"]

_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
_KNOWN = {
    "type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions", "$schema", "$id", "$comment",
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "strict",
}  # fmt: skip
_DIGITS = 'integer ::= "-"? ("0" | [1-9] [0-9]{0,17})\nnumber ::= integer ("." [0-9]{1,17})?\n'
_MAX_DEPTH = 64
_PLAIN = re.compile(r"[A-Za-z_]\w*")  # what a key outside quotes may be


class _Words(NamedTuple):
    """How a style writes things."""

    comma: str
    colon: str  # between key and value of an object
    string: str  # the rule
    quote: str  # around texts of the schema; "" is as in JSON
    key: str  # the rule of a key that the schema does not name
    true: str
    false: str
    null: str


_STYLES = {
    "python": _Words(
        ", ", ": ",
        r'string ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\nt])* "\""', "",
        "key ::= string", "True", "False", "None",
    ),
    "gemma": _Words(
        ",", ":",
        r"""string ::= "<|\"|>" ([^<] | "<" [^<|])* "<|\"|>" """.rstrip(), '<|"|>',
        "key ::= [A-Za-z_] [A-Za-z0-9_]{0,63}", "true", "false", "null",
    ),
    "functiongemma": _Words(
        ",", ":",
        'string ::= "<escape>" ([^<] | "<" [^<e])* "<escape>"', "<escape>",
        "key ::= [A-Za-z_] [A-Za-z0-9_]{0,63}", "true", "false", "null",
    ),
}  # fmt: skip


def literal_grammar(schema: Mapping[str, Any], style: Style) -> str:
    """The arguments of one call: `a=1, b="x"`, or `{a:1,b:<|"|>x<|"|>}`."""
    return _Writer(schema, style).run()


def unbound(schema: Any, path: str = "") -> Iterator[str]:
    """JSON pointers to what `literal_grammar` does not enforce, or cannot write."""
    if not isinstance(schema, Mapping) or path.count("/") > _MAX_DEPTH:
        return
    for keyword, value in schema.items():
        where = f"{path}/{keyword}"
        if keyword not in _KNOWN:
            yield where
        elif keyword in ("properties", "$defs", "definitions") and isinstance(value, Mapping):
            for name, part in value.items():
                if not _PLAIN.fullmatch(name) and keyword == "properties":
                    yield f"{where}/{name}"
                yield from unbound(part, f"{where}/{name}")
        elif keyword in ("anyOf", "oneOf") and isinstance(value, list):
            for index, part in enumerate(value):
                yield from unbound(part, f"{where}/{index}")
        elif keyword in ("items", "additionalProperties"):
            yield from unbound(value, where)


class _Writer:
    def __init__(self, schema: Mapping[str, Any], style: Style) -> None:
        self._schema = schema
        self._python = style == "python"
        self._words = _STYLES[style]
        self._rules: list[str] = []
        self._num_rules = 0
        self._refs: dict[str, str] = {}

    def run(self) -> str:
        words = self._words
        arguments = self._members(self._schema, named=self._python)
        root = arguments if self._python else f'"{{" {arguments} "}}"'
        comma, colon = _quote(words.comma), _quote(words.colon)
        lines = [
            f"root ::= {root}",
            *self._rules,
            words.string,
            words.key,
            _DIGITS.rstrip(),
            f"boolean ::= {_quote(words.true)} | {_quote(words.false)}",
            f"null ::= {_quote(words.null)}",
            f'array ::= "[" (value ({comma} value)*)? "]"',
            f'object ::= "{{" (key {colon} value ({comma} key {colon} value)*)? "}}"',
            "value ::= " + " | ".join(_TYPES),
        ]
        return "\n".join(lines) + "\n"

    def _rule(self, body: str) -> str:
        self._num_rules += 1
        name = f"r{self._num_rules}"
        self._rules.append(f"{name} ::= {body}")
        return name

    def _value(self, schema: Any) -> str:
        """The name of a rule, or an alternative in brackets."""
        if not isinstance(schema, Mapping):
            return "value"
        if isinstance(schema.get("$ref"), str):
            return self._ref(schema["$ref"])
        if "const" in schema:
            return _quote(self._literal(schema["const"]))
        if isinstance(schema.get("enum"), list):
            return self._any(_quote(self._literal(value)) for value in schema["enum"])
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list):
                return self._any(self._value(part) for part in schema[keyword])
        kinds = schema.get("type") or ("object" if "properties" in schema else list(_TYPES))
        return self._any(self._typed(kind, schema) for kind in _list(kinds) if kind in _TYPES)

    def _any(self, options: Iterator[str]) -> str:
        found = list(dict.fromkeys(options))
        return f"({' | '.join(found)})" if found else "value"

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "array" and schema.keys() & {"items", "minItems", "maxItems"}:
            return self._array(schema)
        if kind == "object" and schema.keys() & {"properties", "additionalProperties"}:
            return self._rule(f'"{{" {self._members(schema)} "}}"')
        return kind

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items"))
        low, high = _count(schema.get("minItems")) or 0, _count(schema.get("maxItems"))
        if high == 0:
            return '"[]"'
        more = f"{{{max(0, low - 1)},{'' if high is None else high - 1}}}"
        some = f"{item} ({_quote(self._words.comma)} {item}){more}"
        return self._rule(f'"[" {some} "]"' if low else f'"[" ({some})? "]"')

    def _ref(self, ref: str) -> str:
        if ref not in self._refs:
            target: Any = self._schema  # of a reference to elsewhere, anything will do
            for name in ref.removeprefix("#").split("/")[1:]:
                name = name.replace("~1", "/").replace("~0", "~")
                target = target.get(name) if isinstance(target, Mapping) else None
            self._num_rules += 1
            self._refs[ref] = f"r{self._num_rules}"
            self._rules.append(f"{self._refs[ref]} ::= {self._value(target)}")
        return self._refs[ref]

    def _members(self, schema: Mapping[str, Any], named: bool = False) -> str:
        """What stands between the brackets of an object; of a call's own, if it is `named`."""
        properties = schema.get("properties")
        comma = _quote(self._words.comma)
        if not properties or not isinstance(properties, Mapping):
            others = schema.get("additionalProperties", True)
            if others is False:
                return '""'
            colon = '"="' if named else _quote(self._words.colon)
            key = "[A-Za-z_] [A-Za-z0-9_]{0,63}" if named else "key"
            pair = f"{key} {colon} {self._value(others)}"
            return f"({pair} ({comma} {pair})*)?"
        required = _list(schema.get("required"))
        first = rest = '""'  # before and after some member, from the last one backwards
        for name, part in reversed([*properties.items()]):
            if not _PLAIN.fullmatch(name) and (named or not self._python):
                continue
            member = self._rule(f"{_quote(self._key(name, named))} {self._value(part)}")
            if name in required:
                first = self._rule(f"{member} {rest}")
                rest = self._rule(f"{comma} {member} {rest}")
            else:
                first = self._rule(f"{member} {rest} | {first}")
                rest = self._rule(f"({comma} {member})? {rest}")
        return first

    def _key(self, name: str, named: bool) -> str:
        if named:
            return f"{name}="
        return (self._literal(name) if self._python else name) + self._words.colon

    def _literal(self, value: Any) -> str:
        words = self._words
        match value:
            case None:
                return words.null
            case bool():
                return words.true if value else words.false
            case str():
                if not words.quote:
                    return json.dumps(value, ensure_ascii=False)
                return f"{words.quote}{value}{words.quote}"
            case list():
                return f"[{words.comma.join(map(self._literal, value))}]"
            case dict():
                pairs = (self._key(str(k), False) + self._literal(v) for k, v in value.items())
                return "{" + words.comma.join(pairs) + "}"
        return json.dumps(value)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _quote(text: str) -> str:
    """A terminal of EBNF: JSON's escapes, which are its own too."""
    return json.dumps(text, ensure_ascii=False)
