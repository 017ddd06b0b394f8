# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Llama 4, LFM2, OLMo 3: Python calls in a list, `[f(a=1), g()]`."""

import ast
import re
import warnings
from typing import Any, ClassVar

from llmserve.parsers.base import ToolParser
from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_text import dumps
from llmserve.parsers.reader import Reader, Step

_NAME = re.compile(r"\s*(?P<name>[A-Za-z_][\w.\-]*)\s*\(")
_KEYWORD = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*=(?!=)")
_STOP = re.compile(r"[()\[\]{},\"'\\]")
_INSIDE = {'"': re.compile(r"[\"\\]"), "'": re.compile(r"['\\]")}
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"null": None, "true": True, "false": False, "None": None, "True": True, "False": False}
_DEPTH = 64


class Pythonic(ToolParser):
    """A bare list at the very start of the output, or a list between markers.

    Values are read as literals and never run. A call is held until its bracket closes.
    """

    openers = ("<|python_start|>",)
    closer: ClassVar[str] = "<|python_end|>"
    markers = ("<|python_start|>", "<|python_end|>")
    starts_bare: ClassVar[bool] = True
    brackets: ClassVar[bool] = True
    envelope: ClassVar[Envelope | None] = Envelope(
        "{name}(", ")", style="python", before="[", between=", ", after="]"
    )

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        if self.starts_bare:
            reader.record("")
            yield from self._read_list(reader)
            reader.rollback()
        while (yield from self.next_opener(reader)):
            yield from self._read_list(reader)
            reader.rollback()

    def _read_list(self, reader: Reader) -> Step[None]:
        yield from reader.space()
        if self.brackets and not (yield from reader.at("[")):
            return
        while (yield from self._read_call(reader)):
            reader.record("")
            yield from reader.space()
            if self.brackets and not (yield from reader.at(",")):
                break
        if reader.idle and reader.num_calls:
            if self.brackets and (yield from reader.at("]")):
                reader.record("")
            yield from reader.space()
            if (yield from reader.at(self.closer)):
                reader.record("")

    def _read_call(self, reader: Reader) -> Step[bool]:
        """Reads one call; False if there is none, and then what was read is recorded."""
        yield from reader.space()
        if not re.match(r"[A-Za-z_]", (yield from reader.peek())):
            return False
        head = yield from reader.match(_NAME)
        if head is None or not reader.allows(head["name"]):
            return False
        values: dict[str, str] = {}
        yield from reader.space()
        while not (yield from reader.at(")")):
            keyword = yield from reader.match(_KEYWORD)
            text = (yield from _read_literal(reader)) if keyword else None
            if keyword is None or text is None:
                return False
            value = _json(text.strip())
            if value is None:
                return False
            values[keyword["key"]] = value
            yield from reader.at(",")
            yield from reader.space()
        reader.commit()
        reader.call(head["name"])
        members = (f"{dumps(key)}: {value}" for key, value in values.items())
        reader.arguments("{" + ", ".join(members) + "}")
        return True


class Lfm2(Pythonic):
    """LFM2's markers; text may stand before and after."""

    openers = ("<|tool_call_start|>",)
    closer = "<|tool_call_end|>"
    markers = ("<|tool_call_start|>", "<|tool_call_end|>")
    starts_bare = False
    envelope = Envelope(
        "{name}(", ")", style="python", before=f"{openers[0]}[", between=", ", after=f"]{closer}"
    )


class Olmo3(Pythonic):
    """One call a line in `<function_calls>`, without brackets."""

    openers = ("<function_calls>",)
    closer = "</function_calls>"
    markers = ("<function_calls>", "</function_calls>")
    starts_bare = brackets = False
    envelope = Envelope(
        "{name}(",
        ")",
        style="python",
        before=f"{openers[0]}\n",
        between="\n",
        after=f"\n{closer}",
    )


def _read_literal(reader: Reader) -> Step[str | None]:
    """Reads up to the comma or bracket that ends a value; None if it is broken or cut."""
    pieces: list[str] = []
    closers: list[str] = []
    quote, escaped = "", False
    while True:
        text, at = reader.text, reader.pos
        if escaped and at < len(text):
            at, escaped = at + 1, False
        while at < len(text):
            found = (_INSIDE[quote] if quote else _STOP).search(text, at)
            at = len(text) if found is None else found.start()
            if found is None:
                break
            char = text[at]
            if char == "\\":
                escaped = at + 1 == len(text)
                at += 1 if escaped else 2
                continue
            if quote:
                quote = ""
            elif char in "\"'":
                quote = char
            elif char in _CLOSERS:
                closers.append(_CLOSERS[char])
            elif not closers and char in ",)":
                pieces.append(reader.advance(at))
                return "".join(pieces)
            elif char != "," and (not closers or closers.pop() != char):
                return None
            if len(closers) > _DEPTH:
                return None
            at += 1
        if at > reader.pos:
            pieces.append(reader.advance(at))
        if reader.ended:
            return None
        yield


def _json(text: str) -> str | None:
    """A Python literal as JSON; None for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes
            return dumps(_literal(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """A literal's value; ValueError for code."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [None if key is None else _literal(key) for key in keys]
            if not all(isinstance(name, str) for name in names):
                raise ValueError("a key is no string")
            return dict(zip(names, map(_literal, values), strict=True))
    raise ValueError("no literal")
