# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Apertus: an array of objects whose only key is the tool's name."""

from llmserve.parsers.base import ToolParser
from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_text import read_arguments, read_string
from llmserve.parsers.reader import Markers, Reader, Step

_OPENER, _CLOSER = "<|tools_prefix|>", "<|tools_suffix|>"


class Apertus(ToolParser):
    """`<|tools_prefix|>[{"f": {"a": 1}}]<|tools_suffix|>`."""

    openers = (_OPENER,)
    markers = (_OPENER, _CLOSER)
    envelope = Envelope('{"{name}": ', "}", before=f"{_OPENER}[", between=", ", after=f"]{_CLOSER}")

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        while (yield from self.next_opener(reader)):
            yield from reader.space()
            yield from reader.at("[")
            some = False
            while (yield from self._read_call(reader)):
                some = True
                reader.record("")
                yield from reader.space()
                yield from reader.at(",")
            if some:
                yield from reader.at("]")
                yield from reader.space()
                if (yield from reader.at(_CLOSER)):
                    reader.record("")
            reader.rollback()

    def _read_call(self, reader: Reader) -> Step[bool]:
        """Reads one object; False if it is no call."""
        yield from reader.space()
        if not (yield from reader.at("{")):
            return False
        yield from reader.space()
        name = yield from read_string(reader)
        yield from reader.space()
        if name is None or not (yield from reader.at(":")):
            return False
        yield from reader.space()
        outcome = yield from read_arguments(reader, name)
        if outcome == "none":
            return False
        reader.commit()
        if outcome == "torn":
            yield from reader.until(Markers((_CLOSER,)), reader.arguments)
            return True
        yield from reader.space()
        yield from reader.at("}")
        return True
