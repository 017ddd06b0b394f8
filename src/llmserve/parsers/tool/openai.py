# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gpt-oss: calls are messages with a recipient."""

from llmserve.parsers.base import ToolParser
from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.harmony import CHANNEL, MARKERS, MESSAGE, read_harmony
from llmserve.parsers.reader import Reader, Step


class Harmony(ToolParser):
    """Reads all channels by itself."""

    markers = MARKERS
    reasons = True
    # <|call|>, which follows, is an end of text
    envelope = Envelope(
        f"{CHANNEL}commentary to=functions.{{name}} <|constrain|>json{MESSAGE}", "", single=True
    )

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        yield from read_harmony(reader, calls=True)
