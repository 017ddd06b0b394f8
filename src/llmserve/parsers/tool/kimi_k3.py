# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kimi K3: calls are blocks, and their arguments say what type they are."""

import re

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.reader import Reader, Step
from llmserve.parsers.schema_values import TEXT
from llmserve.parsers.xml_calls import XmlCalls
from llmserve.parsers.xtml import (
    CLOSE,
    MARKERS,
    MESSAGE_END,
    OPEN,
    RESPONSE_END,
    SEP,
    TOOLS,
    TOOLS_END,
    read_xtml,
)

_END = rf"\s{{0,8}}{re.escape(SEP)}"


class KimiK3(XmlCalls):
    """`<|open|>call tool="F" index="1"<|sep|>`, and in it an argument's text between
    `<|open|>argument key="K" type="string"<|sep|>` and `<|close|>argument<|sep|>`; it is JSON where
    the type is another. Reads all blocks by itself.
    """

    markers = MARKERS
    reasons = True
    closers = (TOOLS_END, MESSAGE_END)
    call_opener, call_closer = f"{OPEN}call", f"{CLOSE}call{SEP}"
    call = re.compile(r"\s{1,8}tool=\"(?P<name>[^\"<>\n]+)\"(\s{1,8}index=\"[0-9]*\")?" + _END)
    argument_opener, argument_closer = f"{OPEN}argument", f"{CLOSE}argument{SEP}"
    argument = re.compile(
        r"\s{1,8}key=\"(?P<key>[^\"\n]*)\"(\s{1,8}type=\"(?P<type>[a-z]*)\")?" + _END
    )

    # The block of the answer comes first; the prompt or the grammar has opened it
    envelope = Envelope(
        f'{OPEN}call tool="{{name}}" index="',
        call_closer,
        style="kimi_k3_xml",
        before=RESPONSE_END + TOOLS,
        after=TOOLS_END + MESSAGE_END,
        numbered=f'"{SEP}',
        answered=True,
    )

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        inside = self.reasoning is not None and self.reasoning.inside
        yield from read_xtml(reader, inside, self.read_calls)

    def unescape(self, attribute: str) -> str:
        """See XmlCalls."""
        return attribute.replace("&quot;", '"').replace("&amp;", "&")

    def value_types(self, tag: re.Match[str], schema: object) -> frozenset[str] | None:
        """See XmlCalls."""
        return TEXT if tag["type"] == "string" else None
