# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a format of tool calls and a format of reasoning are, and the two put together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from llmserve.core.outputs import Part
from llmserve.parsers.reader import Markers, Reader, Step

Tools = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of its arguments

_NOTHING = Markers(())


class ReasoningParser(ABC):
    """One format of reasoning.

    `prompt` is the rendered prompt that the output follows, or, with `continued`, the text of the
    message that it continues. It decides whether the output begins inside reasoning.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # texts that may be special tokens of the model

    def __init__(self, prompt: str, continued: bool) -> None:
        self.inside = self.begins_inside(prompt, continued)

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
    reasons: ClassVar[bool] = False  # it reads reasoning too

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


class OutputParser:
    """One output's text to Parts. Joined, they are the same however the text is cut."""

    def __init__(self, reasoning: ReasoningParser | None, tool: ToolParser | None) -> None:
        self._reader = Reader(trims=tool is not None)
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
        return self._reader.take_parts()

    def finish(self, complete: bool) -> list[Part]:
        """The rest. `complete` is whether the model ended by itself: then a call whose end markers
        are missing is closed, otherwise it stays cut."""
        reader = self._reader
        reader.ended, reader.complete = True, complete
        for _ in self._steps:
            raise AssertionError("a parser waits after the end")
        reader.finish()
        return reader.take_parts()

    def _run(self, reasoning: ReasoningParser | None, tool: ToolParser | None) -> Step[None]:
        reader = self._reader
        if reasoning is not None and not (tool and tool.reasons):
            yield from reasoning.run(reader, tool.openers if tool else ())
        if tool is not None:
            yield from tool.run(reader)
        yield from reader.until(_NOTHING, reader.content)
