# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GLM 4.5 to 4.7, Hunyuan 3: keys and values in tags of their own."""

import re
from typing import ClassVar

from llmserve.parsers.base import ToolParser
from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_text import dumps
from llmserve.parsers.reader import Markers, Reader, Step
from llmserve.parsers.schema_values import is_text, to_json, types_of
from llmserve.parsers.xml_calls import no_tags

_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_OPENER, _CLOSER = "<tool_call>", "</tool_call>"
_SECTION, _SECTION_END, _SEP = "<tool_calls>", "</tool_calls>", "<tool_sep>"
_HEAD = re.compile(r"\s*(?P<name>[^\s<>{}\[\]\"]+)\s*(<tool_sep>\s*)?(?=<arg_key>|</tool_call>)")
_NEXT = Markers((_KEY, _CLOSER))
_KEY_ENDS = Markers((_KEY_END, _VALUE, _KEY, _CLOSER))
_VALUE_ENDS = Markers((_VALUE_END, f"\n{_CLOSER}", f"\n{_KEY}"))


class Glm(ToolParser):
    """`<tool_call>F<arg_key>K</arg_key><arg_value>` text `</arg_value></tool_call>`.

    4.5 has newlines between the tags, 4.7 none; the text is verbatim. What else stands between
    arguments is content behind the call.
    """

    openers: ClassVar[tuple[str, ...]] = (_OPENER,)
    markers: ClassVar[tuple[str, ...]] = (_OPENER, _CLOSER, _KEY, _KEY_END, _VALUE, _VALUE_END)

    envelope: ClassVar[Envelope | None] = Envelope(
        "<tool_call>{name}\n", "</tool_call>", style="glm_xml", between="\n"
    )

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        while opener := (yield from self.next_opener(reader)):
            if opener == _SECTION:
                yield from reader.space()
                opener = yield from reader.at(_OPENER)
            head = (yield from reader.match(_HEAD)) if opener else None
            if head is None or not reader.allows(head["name"]):
                reader.rollback()
                continue
            reader.commit()
            reader.call(head["name"])
            yield from self._read_arguments(reader, head["name"])
            if _SECTION in self.openers:
                reader.record("")
                yield from reader.space()
                if (yield from reader.at(_SECTION_END)):
                    reader.commit()
                reader.rollback()

    def _read_arguments(self, reader: Reader, name: str) -> Step[None]:
        schema = self.tools.get(name, {})
        before = "{"
        between: list[str] = []
        while True:
            found = yield from reader.until(_NEXT, between.append)
            if found != _KEY:
                break
            texts: list[str] = []
            end = yield from reader.until(_KEY_ENDS, texts.append, frozenset((_KEY, _CLOSER)))
            key = "".join(texts).strip()
            if end == _KEY_END:
                texts += [end, (yield from reader.space())]
                end = yield from reader.at(_VALUE)
            if end != _VALUE:
                between += [_KEY, *texts]
                continue
            reader.arguments(before + dumps(key) + ": ")
            before = ", "
            types = types_of(schema, key)
            pieces: list[str] = []
            text = is_text(types)
            sink = (lambda t: reader.arguments(dumps(t)[1:-1])) if text else pieces.append
            reader.arguments('"' if text else "")
            leave = frozenset((f"\n{_CLOSER}", f"\n{_KEY}"))
            ended = yield from reader.until(_VALUE_ENDS, sink, leave)
            if not (ended or reader.complete):
                return
            reader.arguments('"' if text else to_json("".join(pieces), types))
        if found or reader.complete:
            reader.arguments("{}" if before == "{" else "}")
        reader.content(no_tags("".join(between)))


class HyV3(Glm):
    """`<tool_calls><tool_call>F<tool_sep>`, then as GLM 4.5, and `</tool_calls>` behind all."""

    openers = (_SECTION, _OPENER)
    markers = (*Glm.markers, _SECTION, _SECTION_END, _SEP)
    envelope = Envelope(
        "<tool_call>{name}<tool_sep>\n",
        "</tool_call>",
        style="glm_xml",
        before="<tool_calls>\n",
        between="\n",
        after="\n</tool_calls>",
    )
