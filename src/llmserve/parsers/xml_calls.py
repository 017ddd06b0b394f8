# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Calls as XML-like tags: `<function=NAME> <parameter=KEY> text </parameter> </function>`.

The text is JSON after the argument's schema. Tags may be missing: an argument ends where the next
thing begins on a line of its own, a call where the next one begins. What else stands between
arguments is content behind the call.
"""

import re
from typing import ClassVar

from llmserve.parsers.base import ToolParser, read_calls
from llmserve.parsers.json_text import dumps, loads
from llmserve.parsers.reader import Markers, Reader, Step
from llmserve.parsers.schema_values import is_text, to_json, types_of

_CLOSING_TAG = re.compile(r"</[^<>]*>|<\|close\|>[^<>]*<\|sep\|>")


class XmlCalls(ToolParser):
    """`openers` and `closers` around calls; `call` and `argument` match the two opening tags,
    with groups `name` and `key`. Strings lose one newline at each side if `trims_newlines`."""

    closers: ClassVar[tuple[str, ...]]
    call_opener: ClassVar[str]  # what an opening tag begins with
    call: ClassVar[re.Pattern[str]]
    call_closer: ClassVar[str]
    argument_opener: ClassVar[str]
    argument: ClassVar[re.Pattern[str]]
    argument_closer: ClassVar[str]
    trims_newlines: ClassVar[bool] = False

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        while opener := (yield from self.next_opener(reader)):
            yield from self.read_calls(reader, opener)

    def read_calls(self, reader: Reader, opener: str) -> Step[None]:
        """Reads calls behind `opener`, which is recorded. What is no call is content."""
        return read_calls(reader, opener, self.call_opener, self.closers, self.read_call)

    def read_call(self, reader: Reader) -> Step[bool]:
        """Reads a call behind the start of its opening tag; False if it is none."""
        head = yield from reader.match(self.call)
        name = self.unescape(head["name"].strip()) if head else ""
        if not reader.allows(name):
            return False
        reader.commit()
        reader.call(name)
        schema = self.tools.get(name, {})
        leave = frozenset((self.call_opener, *self.closers))
        ends = Markers((self.argument_opener, self.call_closer, *leave))
        before = "{"
        between: list[str] = []
        while True:
            found = yield from reader.until(ends, between.append, leave)
            if found != self.argument_opener:
                break
            tag = yield from reader.match(self.argument)
            if tag is None:
                between.append(found)
                continue
            reader.arguments(before + dumps(self.unescape(tag["key"].strip())) + ": ")
            before = ", "
            if not (yield from self._read_value(reader, tag, schema)):
                return True
        if found or reader.complete:
            reader.arguments("{}" if before == "{" else "}")
        reader.content(no_tags("".join(between)))
        return True

    def unescape(self, attribute: str) -> str:
        """What the name of a tool or an argument was before it was written in a tag."""
        return attribute

    def value_types(self, tag: re.Match[str], schema: object) -> frozenset[str] | None:
        """The types that an argument may have; None if its text is JSON as it stands."""
        return types_of(schema if isinstance(schema, dict) else {}, tag["key"].strip())

    def _read_value(self, reader: Reader, tag: re.Match[str], schema: object) -> Step[bool]:
        """Reads an argument's text and its closing tag; False if it is cut."""
        types = self.value_types(tag, schema)
        others = (self.argument_opener, self.call_closer, self.call_opener, *self.closers)
        closers = [self.argument_closer, *(f"\n{marker}" for marker in others)]
        if self.trims_newlines:
            closers.append(f"\n{self.argument_closer}")
            yield from reader.at("\n")
        leave = frozenset(closers[1 : 1 + len(others)])
        if types is not None and is_text(types):
            reader.arguments('"')
            found = yield from reader.until(
                Markers(closers), lambda text: reader.arguments(dumps(text)[1:-1]), leave
            )
            if found or reader.complete:
                reader.arguments('"')
            return bool(found) or reader.complete
        pieces: list[str] = []
        found = yield from reader.until(Markers(closers), pieces.append, leave)
        if not found and not reader.complete:
            return False
        text = "".join(pieces)
        reader.arguments(to_json(text, types) if types is not None else as_json(text))
        return True


def no_tags(text: str) -> str:
    """What stood between arguments, unless it is whitespace and tags that close nothing."""
    return text if _CLOSING_TAG.sub("", text).strip() else ""


def as_json(text: str) -> str:
    """JSON in one form; a string where it is none."""
    value = loads(text)
    return dumps(text if value is None and text.strip() != "null" else value)


def quoted(attribute: str, group: str) -> str:
    """A pattern for the rest of a tag with one attribute, its value quoted or not, up to `>`."""
    return rf"\s*{attribute}=(?P<q_{group}>[\"']?)(?P<{group}>[^\"'<>\n]+)(?P=q_{group})"
