# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Calls that are JSON objects `{"name": ..., "arguments": ...}`, alone, in a row or in an array."""

import re
from functools import cache
from typing import ClassVar

from llmserve.parsers.base import ToolParser
from llmserve.parsers.json_text import read_call
from llmserve.parsers.reader import Markers, Reader, Step


class JsonCalls(ToolParser):
    """Objects between an opener and, where the format has one, `closer`.

    At the very start of the output what begins with a character of `bare` needs no opener.
    """

    closer: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]] = ("arguments", "parameters")
    bare: ClassVar[str] = ""

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        if self.bare:
            reader.record("")
            yield from reader.space()
            if (yield from reader.peek()) in tuple(self.bare):
                yield from self.read_body(reader, bare=True)
            reader.rollback()
        while (yield from self.next_opener(reader)):
            yield from self.read_body(reader)

    def read_body(self, reader: Reader, *, bare: bool = False) -> Step[None]:
        """Reads what follows an opener. What is recorded is content unless it was a call."""
        some = False
        yield from reader.space()
        array = bool((yield from reader.at("[")))
        while True:
            yield from reader.space()
            outcome = yield from read_call(reader, self.keys, bare=bare)
            if outcome == "none":
                break
            some = True
            if outcome == "torn":
                reader.commit()
                end = Markers([self.closer] if self.closer else [])
                yield from reader.until(end, reader.arguments)
                return
            reader.record("")
            yield from reader.space()
            yield from reader.at(",", ";")
        if some and array and (yield from reader.at("]")):
            reader.record("")
            yield from reader.space()
        if some and self.closer and (yield from reader.match(_up_to(self.closer))):
            reader.commit()
        reader.rollback()


@cache
def _up_to(closer: str) -> re.Pattern[str]:
    """A closer, and before it the little too much that models write."""
    return re.compile(f".{{0,16}}?{re.escape(closer)}", re.DOTALL)
