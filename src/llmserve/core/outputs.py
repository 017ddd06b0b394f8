# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a caller of `LLM` or `AsyncLLM` gets back."""

from typing import Literal

import msgspec


class Logprob(msgspec.Struct, gc=False):
    """One token's log-probability; `rank` 1 is the likeliest, None is not known."""

    logprob: float
    rank: int | None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct):
    """One continuation. In a stream of deltas, `text` and `token_ids` are only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct):
    """One request's prompt and its `n` continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


class Part(msgspec.Struct):
    """A piece of output that a parser has understood.

    `text` is visible text, reasoning, the name of the tool that call `index` is for, or the next
    fragment of that call's arguments. `id` is set on a "call" whose format writes an id.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = 0
    id: str | None = None


class Delta(msgspec.Struct, gc=False):
    """What is new in one continuation since the last look; steps that piled up are merged.

    `logprobs` has one entry a new token: (token ids, log-probabilities, rank of the token), column
    0 being the token itself. With a parser, `text` is the content in `parts`, which are in the
    order of the output; `num_reasoning` counts the new tokens that are reasoning, and `hidden` says
    of each new token whether it belongs to reasoning, markers included.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[tuple[list[int], list[float], int]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    parts: list[Part] = []
    num_reasoning: int = 0
    hidden: list[bool] = []
