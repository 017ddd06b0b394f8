# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Reasoning between an opener and a closer."""

from typing import ClassVar

from llmserve.parsers.base import ReasoningParser
from llmserve.parsers.call_grammar import Thought
from llmserve.parsers.reader import Markers, Reader, Step


class TagReasoning(ReasoningParser):
    """Reasoning from one of `opens` to one of `closes`.

    The model writes the opener, or the prompt does and the model may repeat it. With `unopened`,
    the model begins inside even after a prompt without an opener, unless that closes it.
    """

    unopened: ClassVar[bool] = False
    skips: ClassVar[bool] = False  # a closer alone at the start means no reasoning

    def begins_inside(self, prompt: str, continued: bool) -> bool:
        """See ReasoningParser."""
        if continued:
            opened = max(prompt.rfind(marker) for marker in self.opens)
            return opened > max(prompt.rfind(marker) for marker in self.closes)
        end = prompt[-64:].rstrip()
        return end.endswith(self.opens) or (self.unopened and not end.endswith(self.closes))

    @property
    def thought(self) -> Thought | None:
        """See ReasoningParser."""
        return Thought("" if self.inside else self.opens[0], self.closes[0])

    def run(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        """See ReasoningParser."""
        if self.inside:
            reader.begin_reasoning()
            yield from reader.space()
            yield from reader.at(*self.opens)
        else:
            space = yield from reader.space()
            if self.skips and (yield from reader.at(*self.closes)):
                reader.end_reasoning()
                return
            if not (yield from reader.at(*self.opens)):
                reader.content(space)
                return
            reader.begin_reasoning()
        yield from self._read(reader, openers)

    def again(self, reader: Reader, openers: tuple[str, ...]) -> Step[bool]:
        """See ReasoningParser."""
        if not (yield from reader.at(*self.opens)):
            return False
        reader.begin_reasoning()
        yield from self._read(reader, openers)
        return True

    def _read(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        yield from reader.space()
        ends = Markers((*self.closes, *openers))
        found = yield from reader.until(ends, reader.reasoning, frozenset(openers))
        if not found:
            return
        reader.end_reasoning()
        space = yield from reader.space()
        while (yield from reader.at(*self.closes)):
            space = yield from reader.space()
        reader.content(space.rpartition("\n")[2] if "\n" in space else "")
