# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a format of tool calls and a format of reasoning are, and the two put together."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from llmserve.core.outputs import Part
from llmserve.parsers.call_grammar import Envelope, Thought
from llmserve.parsers.reader import Markers, Reader, Step

Tools = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of its arguments

_NOTHING = Markers(())


class ReasoningParser(ABC):
    """One format of reasoning.

    `prompt` is the rendered prompt that the output follows, or, with `continued`, the text of the
    message that it continues. It decides whether the output begins inside reasoning.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # texts that may be special tokens of the model
    efforts: ClassVar[tuple[str, ...] | None] = None  # the levels of effort, where they are fixed
    opens: ClassVar[tuple[str, ...]] = ()  # texts that begin reasoning
    closes: ClassVar[tuple[str, ...]] = ()  # texts that end it
    reopens: ClassVar[bool] = False  # an opener begins reasoning wherever it stands

    def __init__(self, prompt: str, continued: bool) -> None:
        self.continued = continued
        self.inside = self.begins_inside(prompt, continued)

    @property
    def thought(self) -> Thought | None:
        """The reasoning that an output may begin with, for a grammar."""
        return None

    @classmethod
    def endings(cls, calls: bool) -> tuple[str, ...]:
        """What ends reasoning that has gone on for too long: the first time, the second time, and
        so on. Behind it an answer comes or, with `calls`, perhaps a call."""
        return cls.closes[:1]

    @abstractmethod
    def begins_inside(self, prompt: str, continued: bool) -> bool:
        """Whether the prompt has opened reasoning and not closed it."""

    @abstractmethod
    def run(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        """Reads the reasoning at the start of an output. One of `openers` ends it, unread."""

    def again(self, reader: Reader, openers: tuple[str, ...]) -> Step[bool]:
        """Reads more reasoning, if what comes next is its opener."""
        return False
        yield


class ToolParser(ABC):
    """One format of tool calls. What does not parse is content, and nothing raises."""

    openers: ClassVar[tuple[str, ...]] = ()  # texts that begin calls
    markers: ClassVar[tuple[str, ...]] = ()  # texts that may be special tokens of the model
    envelope: ClassVar[Envelope | None] = None  # how a grammar makes calls; None if it cannot
    reasons: ClassVar[bool] = False  # it reads reasoning too
    id_length: ClassVar[int | None] = None  # templates refuse ids that are not so many of A-Za-z0-9

    def __init__(self, tools: Tools, reasoning: ReasoningParser | None = None) -> None:
        self.tools = tools
        self.reasoning = reasoning
        self._openers = Markers(self.openers)

    @abstractmethod
    def run(self, reader: Reader) -> Step[None]:
        """Reads the output behind its reasoning up to its end."""

    def next_opener(self, reader: Reader) -> Step[str]:
        """Reads content up to an opener, which it records; "" at the end.

        Between calls there may be reasoning.
        """
        if self.reasoning is not None and reader.idle:
            space = yield from reader.space()
            while (yield from self.reasoning.again(reader, self.openers)):
                space = yield from reader.space()
            reader.content(space)
        opener = yield from reader.until(self._openers, reader.content)
        if opener:
            reader.record(opener)
        return opener


def read_calls(
    reader: Reader,
    opener: str,
    begin: str,
    closers: tuple[str, ...],
    read_call: Callable[[Reader], Step[bool]],
) -> Step[None]:
    """Reads calls behind `opener`, which is recorded: each starts with `begin`, and one of
    `closers` may end them. `read_call` reads one behind its start; False if it is none. What is no
    call is content."""
    begun = opener
    if begun != begin:
        yield from reader.space()
        begun = yield from reader.at(begin)
    while begun and (yield from read_call(reader)):
        reader.record("")
        yield from reader.space()
        begun = yield from reader.at(begin, *closers)
        if begun != begin:
            if begun or not (yield from reader.peek()):
                reader.commit()
            break
    reader.rollback()


class OutputParser:
    """One output's text to Parts. Joined, they are the same however the text is cut.

    Calls after the first `max_calls` are dropped; `allowed` are the tools that may be called. Every
    call gets an id.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tool: ToolParser | None,
        *,
        allowed: frozenset[str] | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._reader = Reader(tool is not None, allowed)
        self._max_calls = max_calls
        self._id_length = tool.id_length if tool else None
        self._steps = self._run(reasoning, tool)
        next(self._steps)

    @property
    def in_reasoning(self) -> bool:
        """Whether what came last was reasoning."""
        return self._reader.in_reasoning

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return self._reader.num_calls

    def feed(self, text: str) -> list[Part]:
        """What `text` makes certain."""
        self._reader.feed(text)
        next(self._steps)
        return self._visible(self._reader.take_parts())

    def finish(self, complete: bool) -> list[Part]:
        """The rest. `complete` is whether the model ended by itself: then a call whose end markers
        are missing is closed, otherwise it stays cut."""
        reader = self._reader
        reader.ended, reader.complete = True, complete
        for _ in self._steps:
            raise AssertionError("a parser waits after the end")
        reader.finish()
        return self._visible(reader.take_parts())

    def _visible(self, parts: list[Part]) -> list[Part]:
        for part in parts:
            if part.kind == "call" and part.id is None:
                part.id = new_id(self._id_length)
        if self._max_calls is None:
            return parts
        return [
            part
            for part in parts
            if part.kind in ("content", "reasoning") or part.index < self._max_calls
        ]

    def _run(self, reasoning: ReasoningParser | None, tool: ToolParser | None) -> Step[None]:
        reader = self._reader
        if reasoning is not None and not (tool and tool.reasons):
            yield from reasoning.run(reader, tool.openers if tool else ())
        if tool is not None:
            yield from tool.run(reader)
        yield from reader.until(_NOTHING, reader.content)


def new_id(length: int | None = None) -> str:
    """An id for a call: OpenAI's look, or `length` of 0-9a-f."""
    return f"call_{uuid.uuid4().hex[:24]}" if length is None else uuid.uuid4().hex[:length]
