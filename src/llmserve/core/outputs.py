# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a caller of `LLM` or `AsyncLLM` gets back."""

import msgspec


class Logprob(msgspec.Struct):
    """One token's log-probability; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
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


class Delta(msgspec.Struct, gc=False):
    """What is new in one continuation since the last look; steps that piled up are merged.

    `logprobs` has one entry a new token: (token ids, log-probabilities, rank of the token), column
    0 being the token itself.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[tuple[list[int], list[float], int]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
