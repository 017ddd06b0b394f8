# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Calls whose name stands in markers and whose arguments are a JSON object behind it."""

import re
from typing import ClassVar

from llmserve.parsers.base import ToolParser, read_calls
from llmserve.parsers.json_text import read_arguments
from llmserve.parsers.reader import Markers, Reader, Step, drop


class NamedCalls(ToolParser):
    """Calls `begin` head arguments `end`, of which a section `openers[0]`, `section_end` has many.

    `head` matches what stands between `begin` and the arguments, with groups `name` and perhaps
    `id`. The section's own opener may be missing.
    """

    begin: ClassVar[str]
    end: ClassVar[str]
    section_end: ClassVar[str]
    head: ClassVar[re.Pattern[str]]

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        while opener := (yield from self.next_opener(reader)):
            closers = (self.section_end,)
            yield from read_calls(reader, opener, self.begin, closers, self.read_call)

    def read_call(self, reader: Reader) -> Step[bool]:
        """Reads a call behind `begin`; False if there is none."""
        head = yield from reader.match(self.head)
        if head is None:
            return False
        groups = head.groupdict()
        outcome = yield from read_arguments(reader, groups["name"], groups.get("id"))
        if outcome == "none":
            return False
        reader.commit()
        sink = reader.arguments if outcome == "torn" else drop
        ends = Markers((self.end, self.begin, self.section_end))
        leave = frozenset((self.begin, self.section_end))
        yield from reader.until(ends, sink, leave)
        return True
