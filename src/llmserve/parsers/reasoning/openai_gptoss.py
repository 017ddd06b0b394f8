# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gpt-oss: reasoning is the messages on the channel `analysis`."""

from llmserve.parsers.base import ReasoningParser
from llmserve.parsers.call_grammar import Thought
from llmserve.parsers.harmony import CHANNEL, MARKERS, MESSAGE, START, read_harmony
from llmserve.parsers.reader import Reader, Step


class HarmonyReasoning(ReasoningParser):
    """Reads all channels; calls are content."""

    markers = MARKERS
    efforts = ("low", "medium", "high")
    opens = (f"{CHANNEL}analysis{MESSAGE}",)
    closes = ("<|end|>", CHANNEL, START, "<|call|>", "<|return|>")
    reopens = True

    @classmethod
    def endings(cls, calls: bool) -> tuple[str, ...]:
        """See ReasoningParser."""
        final = f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}"
        return (f"<|end|>{START}assistant", final) if calls else (final,)

    @property
    def thought(self) -> Thought | None:
        """See ReasoningParser."""
        if self.continued:
            return None
        end = f"<|end|>{START}assistant"
        return Thought(self.opens[0], end, f"{CHANNEL}final{MESSAGE}")

    def begins_inside(self, prompt: str, continued: bool) -> bool:
        """Channels say it themselves."""
        return False

    def run(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        """See ReasoningParser."""
        yield from read_harmony(reader, calls=False)
