# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gpt-oss: calls are messages with a recipient."""

from llmserve.parsers.base import ToolParser
from llmserve.parsers.harmony import MARKERS, read_harmony
from llmserve.parsers.reader import Reader, Step


class Harmony(ToolParser):
    """Reads all channels by itself."""

    markers = MARKERS
    reasons = True

    def run(self, reader: Reader) -> Step[None]:
        """See ToolParser."""
        yield from read_harmony(reader, calls=True)
