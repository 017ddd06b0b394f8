# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The body of POST /v1/chat/completions."""

from typing import Any, Literal

from pydantic import Field

from llmserve.api.errors import invalid_value
from llmserve.api.fields import (
    INT64_MAX,
    MAX_TEMPLATE_CHARS,
    MAX_TOP_LOGPROBS,
    GenerationBody,
    TokenLimit,
)
from llmserve.api.reasoning import Thinking, read_thinking

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatBody(GenerationBody):
    """`messages` is checked by chat_messages.read_messages, `tools` and `tool_choice` by
    tools.read_tools, whose errors have paths into them."""

    messages: Any = None
    max_completion_tokens: int | None = Field(None, le=INT64_MAX)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=-1, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = Field(None, max_length=MAX_TEMPLATE_CHARS)
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: Effort | None = None
    reasoning: Any = None
    thinking: Any = None
    return_prompt_text: bool = False

    @property
    def wanted_thinking(self) -> Thinking:
        """What the fields about reasoning say together; RequestError."""
        return read_thinking(
            self.reasoning_effort,
            self.thinking_token_budget,
            self.include_reasoning,
            self.reasoning,
            self.thinking,
        )

    @property
    def limit(self) -> TokenLimit:
        """The newer of the two names wins; None is the rest of the context."""
        if self.max_completion_tokens is not None:
            return TokenLimit(self.max_completion_tokens, "max_completion_tokens")
        return TokenLimit(self.max_tokens, "max_tokens")

    @property
    def wants_logprobs(self) -> bool:
        """See GenerationBody."""
        return self.logprobs

    @property
    def num_logprobs(self) -> int | None:
        """SamplingParams' logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Rules between fields; RequestError."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise invalid_value("top_logprobs", "it needs logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid_value(
                "continue_final_message", "it must not be true together with add_generation_prompt"
            )
