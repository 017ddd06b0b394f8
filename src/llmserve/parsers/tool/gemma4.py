# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gemma 4 and FunctionGemma: `call:NAME{key:value}` in tags, with literals of their own."""

import re
from typing import Any, ClassVar

from llmserve.parsers.base import ToolParser
from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_text import dumps, loads
from llmserve.parsers.reader import Markers, Reader, Step

_HEAD = re.compile(
    r"\s*(call\s*:)?\s*(?P<name>[^\s{}()<>:,]+)\s*(?=[{(]|<tool_call\|>|<end_function_call>)"
)
_TOKEN = re.compile(r"\s*([{}\[\]:,]|[^{}\[\]:,\s][^{}\[\]:,]*)")
_DEPTH = 64


class Gemma4(ToolParser):
    """`<|tool_call>call:f{k:<|"|>text<|"|>,n:42,l:[1],o:{a:true}}<tool_call|>`.

    `call:` or the brackets may be missing, and `(` may stand for `{`. A call is held until its end.
    """

    closer: ClassVar[str] = "<tool_call|>"
    quote: ClassVar[str] = '<|"|>'
    openers = ("<|tool_call>",)
    markers = (*openers, closer, quote)
    envelope = Envelope("<|tool_call>call:{name}", closer, style="gemma")

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        outside, inside = Markers((self.closer, self.quote)), Markers((self.quote,))
        while (yield from self.next_opener(reader)):
            head = yield from reader.match(_HEAD)
            if head is None or not reader.allows(head["name"]):
                reader.rollback()
                continue
            pieces: list[str | None] = []  # text outside quotes; None and a text is a quoted one
            while True:
                found = yield from _collect(reader, outside, pieces)
                if found != self.quote:
                    break
                pieces.append(None)
                found = yield from _collect(reader, inside, pieces)
                if not found:
                    break
            arguments = _arguments(pieces) if found or reader.complete else None
            if arguments is None:
                reader.rollback()
                continue
            reader.commit()
            reader.call(head["name"])
            reader.arguments(dumps(arguments))


class FunctionGemma(Gemma4):
    """`<start_function_call>call:f{k:<escape>text<escape>}<end_function_call>`."""

    closer = "<end_function_call>"
    quote = "<escape>"
    openers = ("<start_function_call>",)
    markers = (*openers, closer, quote)
    envelope = Envelope("<start_function_call>call:{name}", closer, style="functiongemma")


def _collect(reader: Reader, ends: Markers, pieces: list[str | None]) -> Step[str]:
    texts: list[str] = []
    found = yield from reader.until(ends, texts.append)
    pieces.append("".join(texts))
    return found


def _arguments(pieces: list[str | None]) -> dict[str, Any] | None:
    """The object in what stands between name and closer; None if it is none."""
    if pieces[0] and pieces[0].startswith("("):
        pieces[0] = "{" + pieces[0][1:]
        last = (pieces[-1] or "").rstrip()
        pieces[-1] = last[:-1] + "}" if last.endswith(")") else last
    tokens: list[tuple[bool, str]] = []  # (quoted, text)
    quoted = False
    for piece in pieces:
        if piece is None:
            quoted = True
        elif quoted:
            tokens.append((True, piece))
            quoted = False
        else:
            tokens += [(False, text.rstrip()) for text in _TOKEN.findall(piece)]
    if not tokens:
        return {}
    if tokens[-1] != (False, "}"):
        tokens.append((False, "}"))  # models forget it
    try:
        at, value = _value(tokens, 0, 0)
    except (ValueError, IndexError):
        return None
    return value if at == len(tokens) and isinstance(value, dict) else None


def _value(tokens: list[tuple[bool, str]], at: int, depth: int) -> tuple[int, Any]:
    """The value at `at` and the position behind it; ValueError or IndexError if it is broken."""
    quoted, text = tokens[at]
    if depth > _DEPTH:
        raise ValueError("too deep")
    if quoted:
        return at + 1, text
    if text == "{":
        members: dict[str, Any] = {}
        at += 1
        while tokens[at] != (False, "}"):
            key = tokens[at][1]
            if tokens[at + 1] != (False, ":") or (not tokens[at][0] and key in "{}[]:,"):
                raise ValueError("no key")
            at, members[key.strip("\"'")] = _value(tokens, at + 2, depth + 1)
            at += tokens[at] == (False, ",")
        return at + 1, members
    if text == "[":
        items: list[Any] = []
        at += 1
        while tokens[at] != (False, "]"):
            at, item = _value(tokens, at, depth + 1)
            items.append(item)
            at += tokens[at] == (False, ",")
        return at + 1, items
    if text in "}]:,":
        raise ValueError(text)
    value = loads(text)
    return at + 1, text if value is None and text != "null" else value
