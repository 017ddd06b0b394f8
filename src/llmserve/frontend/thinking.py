# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A budget of reasoning in the words of the engine, which knows tokens and no formats."""

from functools import lru_cache

from llmserve.core.sampling_params import ReasoningBudget
from llmserve.frontend.tokenizer import Tokenizer
from llmserve.parsers.base import ReasoningParser


def make_budget(
    tokenizer: Tokenizer, reasoning: ReasoningParser, openers: tuple[str, ...], tokens: int
) -> ReasoningBudget:
    """`tokens` tokens of `reasoning`, which one of the `openers` of calls ends, too.

    Takes a second for the first request of a large vocabulary.
    """
    opens = [text.encode() for text in reasoning.opens]
    closes = [text.encode() for text in (*reasoning.closes, *openers)]
    return ReasoningBudget(
        tokens=tokens,
        opens=opens,
        closes=closes,
        endings=[
            tokenizer.encode(text, add_special_tokens=False)
            for text in reasoning.endings(bool(openers))
        ],
        pieces=_pieces(tokenizer, (*opens, *closes)),
        inside=reasoning.inside,
        reopens=reasoning.reopens,
    )


@lru_cache(maxsize=8)
def _pieces(tokenizer: Tokenizer, markers: tuple[bytes, ...]) -> dict[int, bytes]:
    """The tokens that can be part of a marker, or are whitespace before it."""
    ends = {marker[at:] for marker in markers for at in range(len(marker))}
    starts = tuple({marker[:at] for marker in markers for at in range(1, len(marker) + 1)})
    inner = {end[:at] for end in ends for at in range(1, len(end) + 1)}
    tails = tuple(ends)
    pieces = ((token, tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    return {
        token: piece
        for token, piece in pieces
        if piece in inner
        or piece.isspace()
        or piece.endswith(starts)
        or piece.startswith(tails)
        or any(marker in piece for marker in markers)
    }
