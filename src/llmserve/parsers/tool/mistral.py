# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Mistral: `[TOOL_CALLS]` and an array (before tokenizer v11), or a name and an object each."""

import re
from typing import ClassVar

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls
from llmserve.parsers.json_text import read_arguments
from llmserve.parsers.reader import Markers, Reader, Step

_HEAD = re.compile(
    r"(?P<name>[^\s\[{]+)\s{0,8}(\[CALL_ID\](?P<id>[A-Za-z0-9]+))?(\[ARGS\])?\s{0,8}(?={)"
)


class Mistral(JsonCalls):
    """`[TOOL_CALLS][{"name": "f", "arguments": {}}]` or `[TOOL_CALLS]f[ARGS]{}`, repeated."""

    openers = ("[TOOL_CALLS]",)
    id_length = 9
    envelope: ClassVar[Envelope | None] = Envelope("[TOOL_CALLS]{name}[ARGS]", "")
    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        while (yield from self.next_opener(reader)):
            yield from reader.space()
            if (yield from reader.peek()) in ("[", "{"):
                yield from self.read_body(reader)
                continue
            head = yield from reader.match(_HEAD)
            if head is None:
                reader.rollback()
                continue
            outcome = yield from read_arguments(reader, head["name"], head["id"])
            if outcome == "none":
                reader.rollback()
                continue
            reader.commit()
            if outcome == "torn":
                end = Markers(self.openers)
                yield from reader.until(end, reader.arguments, frozenset(self.openers))


class MistralArray(Mistral):
    """What grammars make for models before tokenizer v11."""

    envelope = Envelope(
        '{"name": "{name}", "arguments": ', "}", before="[TOOL_CALLS][", between=", ", after="]"
    )
