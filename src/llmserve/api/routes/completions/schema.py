# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The body of POST /v1/completions."""

from typing import Any

from pydantic import Field

from llmserve.api.errors import clip, invalid_type, invalid_value, missing
from llmserve.api.fields import MAX_TOP_LOGPROBS, GenerationBody, TokenLimit
from llmserve.core.sampling_params import MAX_N

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16
_MAX_TOKEN_ID = 2**31 - 1

Prompt = str | list[int]


class CompletionBody(GenerationBody):
    """`prompt` is checked by `prompts`."""

    prompt: Any = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=-1, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool = True
    best_of: int | None = Field(None, ge=1, le=MAX_N)

    def check(self) -> None:
        """Rules between fields; RequestError."""
        super().check()
        if self.use_beam_search and self.echo and self.logprobs is not None:
            raise invalid_value(
                "logprobs", "it is not available with both echo=true and use_beam_search=true"
            )
        if self.suffix:
            for name in ("echo", "truncate_prompt_tokens"):
                if getattr(self, name):
                    raise invalid_value(name, "it is not available with suffix")
        best_of = self.num_drawn
        if best_of < self.n:
            raise invalid_value("best_of", f"it must be at least n={self.n}, got {best_of}")
        if best_of > self.n:
            for name in ("stream", "use_beam_search"):
                if getattr(self, name):
                    raise invalid_value("best_of", f"it must equal n with {name}=true")
            if self.temperature == 0:
                raise invalid_value(
                    "best_of", "it must equal n with temperature=0, which makes equal answers"
                )

    @property
    def wants_logprobs(self) -> bool:
        """See GenerationBody."""
        return self.logprobs is not None

    @property
    def num_drawn(self) -> int:
        """Continuations to make of each prompt, of which `n` are shown."""
        return self.n if self.best_of is None else self.best_of

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
                f"{path}[{index}]", f"{clip(str(token))} is no token id", f"integer_{side}_value"
            )
    return value
