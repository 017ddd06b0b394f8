# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gpt-oss: reasoning is the messages on the channel `analysis`."""

from llmserve.parsers.base import ReasoningParser
from llmserve.parsers.harmony import MARKERS, read_harmony
from llmserve.parsers.reader import Reader, Step


class HarmonyReasoning(ReasoningParser):
    """Reads all channels; calls are content."""

    markers = MARKERS
    efforts = ("low", "medium", "high")

    def begins_inside(self, prompt: str, continued: bool) -> bool:
        """Channels say it themselves."""
        return False

    def run(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        """See ReasoningParser."""
        yield from read_harmony(reader, calls=False)
