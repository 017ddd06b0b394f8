# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The text that parsers read, as it comes.

A parser is a generator that reads one output from its start to its end and yields where it needs
more text. What it decides depends on the text alone, never on where the text was cut, so streamed
parts joined are the parts of the whole text: every method here waits until its answer is certain.
Text is looked at a constant number of times; what waits unread is shorter than LIMIT.
"""

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from llmserve.core.outputs import Part

T = TypeVar("T")
Step = Generator[None, None, T]  # yields where it needs more text
Sink = Callable[[str], None]

LIMIT = 512  # characters that a tag with its name may have

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's escapes can name one, UTF-8 cannot


class Markers:
    """Strings to look for. None may lie in another, but at its end."""

    def __init__(self, markers: Iterable[str]) -> None:
        ordered = sorted(set(markers), key=len, reverse=True)
        assert all(a not in b[:-1] for a in ordered for b in ordered), ordered
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._prefixes = {marker[:end] for marker in ordered for end in range(1, len(marker))}
        self._firsts = frozenset(marker[0] for marker in ordered)
        self._longest = max(map(len, ordered), default=1) - 1
        self.search = self._pattern.search

    def unsure(self, text: str, start: int) -> int:
        """How many characters at the end of `text` may begin a marker."""
        size = len(text)
        for at in range(max(start, size - self._longest), size):
            if text[at] in self._firsts and text[at:] in self._prefixes:
                return size - at
        return 0


class Reader:
    """Text in, Parts out. `complete` is whether the model ended its output by itself.

    `in_reasoning` is the parser's state after all that was fed. With `trims`, whitespace around
    tool calls is no content. With `allowed`, what calls another tool is no call.
    """

    def __init__(self, trims: bool, allowed: frozenset[str] | None = None) -> None:
        self._allowed = allowed
        self.text = ""
        self.pos = 0
        self.ended = False
        self.complete = False
        self.in_reasoning = False
        self.num_calls = 0
        self.idle = False  # nothing but whitespace since the last call
        self._trims = trims
        self._raw: list[str] | None = None
        self._space: list[str] = []  # of content or reasoning: shown if more of it follows
        self._thought = False  # there was reasoning: more of it is a new paragraph
        self._fresh = False  # newlines that come now belong to the end of reasoning
        self._parts: list[Part] = []

    def feed(self, text: str) -> None:
        """More text, or the first of it."""
        self.text = self.text[self.pos :] + text
        self.pos = 0

    def take_parts(self) -> list[Part]:
        """What was understood since the last call, neighbours of one kind joined."""
        parts, self._parts = self._parts, []
        return join_parts(parts)

    # What is written.

    def content(self, text: str) -> None:
        """Visible text. Where the output was cut off behind a call, what is told to be none only by
        that may have begun another, or ended the last."""
        if self.ended and not self.complete and self.num_calls and self.idle:
            return
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        if self._trims:
            text = self._held(text)
        if text:
            self.idle = False
            self._parts.append(Part("content", text))

    def reasoning(self, text: str) -> None:
        """Text of the model's reasoning."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        if text := self._held(text):
            self._parts.append(Part("reasoning", text))

    def begin_reasoning(self) -> None:
        """What follows is reasoning, less its first newlines."""
        self._space[:] = ["\n\n"] if self._thought else []
        self.in_reasoning = self._fresh = self._thought = True

    def end_reasoning(self) -> None:
        """It is over; whitespace at its end and newlines after it are dropped."""
        self._space.clear()
        self.in_reasoning = False
        self._fresh = True

    def allows(self, name: str) -> bool:
        """Whether a call of `name` may be one."""
        return bool(name) and (self._allowed is None or name in self._allowed)

    def call(self, name: str, id: str | None = None) -> None:
        """A call begins."""
        self.idle, self._fresh = True, False
        self._parts.append(Part("call", _encodable(name), self.num_calls, id))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """The next fragment of the last call's arguments."""
        if text:
            self._parts.append(Part("arguments", _encodable(text), self.num_calls - 1))

    def finish(self) -> None:
        """After the last text: whitespace that was held is content unless it follows calls."""
        if self._space and not self.in_reasoning and not self.idle:
            self._parts.append(Part("content", "".join(self._space)))

    def _held(self, text: str) -> str:
        body = text.rstrip()
        if not body:
            if text:
                self._space.append(text)
            return ""
        if self._space:
            whole = "".join(self._space) + body
            self._space.clear()
        else:
            whole = body
        if len(body) < len(text):
            self._space.append(text[len(body) :])
        return whole

    # Going back: a call that turns out to be none is content.

    def record(self, text: str) -> None:
        """Remembers `text` and all that is read from here on."""
        self._raw = [text]

    def commit(self) -> None:
        """Forgets what was recorded."""
        self._raw = None

    def rollback(self) -> None:
        """What was recorded is content."""
        raw, self._raw = self._raw, None
        for text in raw or ():
            self.content(text)

    # What is read.

    def advance(self, end: int) -> str:
        """Reads the text up to position `end`."""
        text = self.text[self.pos : end]
        self.pos = end
        if self._raw is not None:
            self._raw.append(text)
        return text

    def peek(self) -> Step[str]:
        """The next character; "" at the end."""
        while self.pos == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.pos]

    def at(self, *options: str) -> Step[str]:
        """Reads the one of `options` that comes next; "" if none does. None begins another."""
        while True:
            rest = self.text[self.pos : self.pos + LIMIT]
            for option in options:
                if rest.startswith(option):
                    return self.advance(self.pos + len(option))
            if self.ended or not any(option.startswith(rest) for option in options):
                return ""
            yield

    def space(self) -> Step[str]:
        """Reads whitespace."""
        found: list[str] = []
        while True:
            end, size = self.pos, len(self.text)
            while end < size and self.text[end].isspace():
                end += 1
            if end > self.pos:
                found.append(self.advance(end))
            if end < size or self.ended:
                return "".join(found)
            yield

    def until(self, markers: Markers, sink: Sink, leave: frozenset[str] = frozenset()) -> Step[str]:
        """Reads up to a marker and the marker itself, unless it is in `leave`; "" at the end.

        `sink` gets the text before it piece by piece.
        """
        while True:
            found = markers.search(self.text, self.pos)
            if found is not None:
                if found.start() > self.pos:
                    sink(self.advance(found.start()))
                marker = found[0]
                return marker if marker in leave else self.advance(found.end())
            end = len(self.text)
            if not self.ended:
                end -= markers.unsure(self.text, self.pos)
            if end > self.pos:
                sink(self.advance(end))
            if self.ended:
                return ""
            yield

    def match(self, pattern: re.Pattern[str]) -> Step[re.Match[str] | None]:
        """Reads what `pattern` matches here, if that is at most LIMIT characters; else nothing.

        A match must not change when more text follows.
        """
        while True:
            found = pattern.match(self.text, self.pos, self.pos + LIMIT)
            if found is not None:
                self.advance(found.end())
                return found
            if self.ended or len(self.text) - self.pos >= LIMIT:
                return None
            yield


def _encodable(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def drop(text: str) -> None:
    """A sink for what nobody wants."""


def join_parts(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    if len(parts) < 2:
        return parts
    joined: list[Part] = []
    run: list[str] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and part.kind == last.kind != "call" and part.index == last.index:
            run.append(part.text)
            continue
        if last is not None:
            last.text = "".join(run)
        joined.append(part)
        run = [part.text]
    joined[-1].text = "".join(run)
    return joined
