# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""JSON inside an output, read as it comes: its bytes pass through unchanged.

Only what finds the end of a value is checked: strings, brackets, and characters that JSON has
nowhere. A raw control character in a string, which models do write, is escaped.
"""

import json
import math
import re
from typing import Any, Literal

from llmserve.parsers.reader import Reader, Sink, Step, drop

Outcome = Literal["none", "call", "torn"]  # torn: a call whose arguments are no JSON or end early

_OUTSIDE = re.compile(r"[^\s,:0-9A-Za-z+.\-]")  # a bracket, a quote, or what no JSON has
_INSIDE = re.compile(r'["\\\x00-\x1f]')
_SCALAR = re.compile(r"[0-9A-Za-z+.\-]*")
_CLOSERS = {"{": "}", "[": "]"}


def loads(text: str) -> Any:
    """The value of a JSON text; None for what is not JSON."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value


def dumps(value: Any) -> str:
    """The one form of JSON that is made here: `", "` and `": "`, UTF-8 unescaped.

    ValueError for what JSON cannot hold.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def read_value(reader: Reader, sink: Sink, opened: str = "") -> Step[bool]:
    """Reads one value, giving it to `sink` piece by piece; False where it breaks or ends early.

    `opened` is a bracket that has been read already. Whitespace before the value is no part of it.
    """
    closers = [_CLOSERS[opened]] if opened else []
    if not opened:
        first = yield from reader.peek()
        if first not in ('"', "{", "["):
            return (yield from _read_scalar(reader, sink))
    inside = escaped = False
    while True:
        text, at = reader.text, reader.pos
        if escaped and at < len(text):
            at, escaped = at + 1, False
        while at < len(text):
            found = (_INSIDE if inside else _OUTSIDE).search(text, at)
            if found is None:
                at = len(text)
                break
            at = found.start()
            char = text[at]
            if inside:
                if char == "\\":
                    escaped = at + 1 == len(text)
                    at = min(at + 2, len(text))
                    continue
                if char != '"':
                    sink(reader.advance(at))
                    reader.advance(at + 1)
                    sink(json.dumps(char)[1:-1])
                    at += 1
                    continue
                inside = False
            elif char == '"':
                inside = True
            elif char in _CLOSERS:
                closers.append(_CLOSERS[char])
            elif closers and char == closers[-1]:
                closers.pop()
            else:
                _pass(reader, sink, at)
                return False
            at += 1
            if not closers and not inside:
                _pass(reader, sink, at)
                return True
        _pass(reader, sink, at)
        if reader.ended:
            return False
        yield


def _pass(reader: Reader, sink: Sink, end: int) -> None:
    if end > reader.pos:
        sink(reader.advance(end))


def _read_scalar(reader: Reader, sink: Sink) -> Step[bool]:
    some = False
    while True:
        found = _SCALAR.match(reader.text, reader.pos)
        assert found is not None
        if found[0]:
            some = True
            sink(reader.advance(found.end()))
        if reader.pos < len(reader.text) or reader.ended:
            return some
        yield


def read_string(reader: Reader) -> Step[str | None]:
    """Reads a string; None if none comes or it is broken."""
    if (yield from reader.peek()) != '"':
        return None
    pieces: list[str] = []
    whole = yield from read_value(reader, pieces.append)
    value = loads("".join(pieces)) if whole else None
    return value if isinstance(value, str) else None


def read_arguments(reader: Reader, name: str, id: str | None = None) -> Step[Outcome]:
    """Reads an object as the arguments of a call, which begins once it looks like an object."""
    if not reader.allows(name) or not (yield from reader.at("{")):
        return "none"
    space = yield from reader.space()
    if (yield from reader.peek()) not in ('"', "}"):
        return "none"
    reader.call(name, id)
    reader.arguments("{" + space)
    whole = yield from read_value(reader, reader.arguments, opened="{")
    return "call" if whole else "torn"


def as_arguments(raw: str) -> str | None:
    """The object in `raw`: itself, an object written as a string, or nothing; else None."""
    value = loads(raw)
    if isinstance(value, dict):
        return raw
    if isinstance(value, str):
        return as_arguments(value) if value.strip().startswith("{") else None if value else "{}"
    return "{}" if raw == "null" else None


def read_call(reader: Reader, keys: tuple[str, ...], *, bare: bool) -> Step[Outcome]:
    """Reads an object with `name` and, under one of `keys`, arguments; "none" if it is no call.

    `bare` objects, which no marker announces, have no other members and always have arguments.
    Arguments stream once the name is known; members behind them are ignored.
    """
    if not (yield from reader.at("{")):
        return "none"
    name: str | None = None
    held: str | None = None
    while True:
        yield from reader.space()
        if (yield from reader.at("}")):
            break
        if (yield from reader.at(",")):
            continue
        key = yield from read_string(reader)
        yield from reader.space()
        if key is None or not (yield from reader.at(":")):
            return "none"
        yield from reader.space()
        if key in keys and name:
            if (yield from reader.peek()) == "{":
                outcome = yield from read_arguments(reader, name)
                if outcome == "call":
                    yield from _rest(reader)
                return outcome
        elif key == "function" and (yield from reader.peek()) == "{":
            outcome = yield from read_call(reader, keys, bare=bare)
            if outcome == "call":
                yield from _rest(reader)
            return outcome
        elif bare and key not in (*keys, "name", "type", "id"):
            return "none"
        pieces: list[str] = []
        if not (yield from read_value(reader, pieces.append)):
            return "none"
        if key in ("name", "function", "tool_name"):
            value = loads("".join(pieces))
            name = value if isinstance(value, str) else None
            if name is None or not reader.allows(name):
                return "none"
        elif key in keys:
            held = as_arguments("".join(pieces))
            if held is None:
                return "none"
    if not name or (bare and held is None):
        return "none"
    reader.call(name)
    reader.arguments(held or "{}")
    return "call"


def _rest(reader: Reader) -> Step[None]:
    """Reads the members behind the arguments and the closing bracket, as far as they are there."""
    while True:
        yield from reader.space()
        if (yield from reader.at("}")) or not (yield from reader.at(",")):
            return
        yield from reader.space()
        if (yield from read_string(reader)) is None:
            return
        yield from reader.space()
        yield from reader.at(":")
        yield from reader.space()
        if not (yield from read_value(reader, drop)):
            return
