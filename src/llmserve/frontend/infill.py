# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Text between a prefix and a suffix: how the models that were taught it are asked for it."""

from typing import NamedTuple

from llmserve.frontend.tokenizer import Tokenizer


class Infill(NamedTuple):
    """Markers before the prefix and before the suffix, and, where there is one, before what the
    model writes. Without that one, the suffix comes first."""

    prefix: str
    suffix: str
    middle: str | None = None

    def join(self, tokenizer: Tokenizer, prefix: list[int], suffix: list[int]) -> list[int]:
        """The prompt."""
        before, after = self._id(tokenizer, self.prefix), self._id(tokenizer, self.suffix)
        if self.middle is None:
            return [after, *suffix, before, *prefix]
        return [before, *prefix, after, *suffix, self._id(tokenizer, self.middle)]

    def _id(self, tokenizer: Tokenizer, marker: str) -> int:
        token = tokenizer.token_id(marker)
        assert token is not None, marker
        return token


# As their model cards have it, in this order: some vocabularies hold the markers of several
INFILLS = (
    Infill("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen 2.5 Coder, CodeGemma
    Infill("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    Infill("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Infill("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek  # noqa: RUF001
    Infill("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Infill("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    Infill("[PREFIX]", "[SUFFIX]"),  # Codestral
)


def find_infill(tokenizer: Tokenizer) -> Infill | None:
    """The format whose markers the vocabulary has."""
    return next(
        (
            infill
            for infill in INFILLS
            if all(marker is None or tokenizer.token_id(marker) is not None for marker in infill)
        ),
        None,
    )
