# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The body of POST /v1/completions."""

from typing import Any

from pydantic import Field

from llmserve.api.errors import invalid_type, invalid_value, missing
from llmserve.api.fields import MAX_TOP_LOGPROBS, GenerationBody, TokenLimit

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16
_MAX_TOKEN_ID = 2**31 - 1

Prompt = str | list[int]


class CompletionBody(GenerationBody):
    """`prompt` is checked by `prompts`."""

    prompt: Any = None
    logprobs: int | None = Field(None, ge=-1, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def limit(self) -> TokenLimit:
        """16 tokens unless the client says otherwise."""
        return TokenLimit(
            DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, "max_tokens"
        )

    @property
    def prompts(self) -> list[Prompt]:
        """One entry a prompt, as text or as token ids; RequestError has a path."""
        value = self.prompt
        if value is None:
            raise missing("prompt")
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise invalid_type("prompt", "a string or an array", value)
        if not value:
            raise invalid_value("prompt", "it must not be empty", "array_below_min_length")
        if _is_int(value[0]):
            return [_token_ids(value, "prompt")]
        if len(value) > MAX_PROMPTS:
            raise invalid_value(
                "prompt",
                f"it must have at most {MAX_PROMPTS} prompts, got {len(value)}",
                "array_above_max_length",
            )
        return [
            prompt if isinstance(prompt, str) else _token_ids(prompt, f"prompt[{index}]")
            for index, prompt in enumerate(value)
        ]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token_ids(value: object, path: str) -> list[int]:
    if not isinstance(value, list):
        raise invalid_type(path, "a string or an array of token ids", value)
    if not value:
        raise invalid_value(path, "it must not be empty", "array_below_min_length")
    for index, token in enumerate(value):
        if not _is_int(token):
            raise invalid_type(f"{path}[{index}]", "a token id", token)
        if not 0 <= token <= _MAX_TOKEN_ID:
            side = "below_min" if token < 0 else "above_max"
            raise invalid_value(
                f"{path}[{index}]", f"{token} is no token id", f"integer_{side}_value"
            )
    return value
