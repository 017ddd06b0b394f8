# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kimi K3: reasoning is a block, and so is the answer."""

from llmserve.parsers.call_grammar import Thought
from llmserve.parsers.reader import Reader, Step
from llmserve.parsers.tags import TagReasoning
from llmserve.parsers.xtml import MARKERS, RESPONSE, THINK, THINK_END, read_xtml


class KimiK3(TagReasoning):
    """Reads all blocks; calls are content. The prompt has opened reasoning or the answer."""

    opens, closes = (THINK,), (THINK_END,)
    markers = MARKERS

    def __init__(self, prompt: str, continued: bool) -> None:
        super().__init__(prompt, continued)
        self._answers = continued or prompt.endswith(RESPONSE)

    @classmethod
    def endings(cls, calls: bool) -> tuple[str, ...]:
        """See ReasoningParser: an answer comes before calls, if only an empty one."""
        return (f"{THINK_END}{RESPONSE}",)

    @property
    def thought(self) -> Thought | None:
        """See ReasoningParser."""
        if self._answers and not self.inside:
            return None
        return Thought("" if self.inside else THINK, THINK_END, RESPONSE)

    def run(self, reader: Reader, openers: tuple[str, ...]) -> Step[None]:
        """See ReasoningParser."""
        yield from read_xtml(reader, self.inside, None)
