# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much a request wants the model to think: levels for its chat template, and a budget."""

import asyncio
from typing import Any, NamedTuple

from llmserve.api.errors import clip, invalid_choice, invalid_type, invalid_value, unsupported
from llmserve.core.sampling_params import ReasoningBudget
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.thinking import make_budget
from llmserve.parsers.registry import Parsers

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_BUDGET = 2**31 - 1


class Thinking(NamedTuple):
    """What a chat request says about reasoning; None where it says nothing."""

    effort: str | None
    enabled: bool | None
    budget: int | None  # tokens
    shown: bool
    param: str = "thinking_token_budget"  # the field that the budget came from


def read_thinking(
    effort: str | None,
    budget: int | None,
    shown: bool,
    reasoning: object,
    thinking: object,
) -> Thinking:
    """`reasoning_effort`, `thinking_token_budget` and `include_reasoning`, and where these are
    absent OpenRouter's `reasoning` and Anthropic's `thinking`; RequestError has a path."""
    param = "thinking_token_budget"
    enabled = None if effort is None else effort != "none"
    if thinking is not None:
        path = "thinking"
        kind = _get(thinking, path, "type", str, "a string")
        if kind not in ("enabled", "disabled", "adaptive", None):
            raise invalid_choice(f"{path}.type", kind, ["enabled", "disabled", "adaptive"])
        tokens = _tokens(thinking, path, "budget_tokens")
        if enabled is None and kind is not None:
            enabled = kind != "disabled"
        if budget is None and tokens is not None and kind != "disabled":
            budget, param = tokens, f"{path}.budget_tokens"
    if reasoning is not None:
        path = "reasoning"
        level = _get(reasoning, path, "effort", str, "a string")
        if level is not None and level not in EFFORTS:
            raise invalid_choice(f"{path}.effort", level, EFFORTS)
        wanted = _get(reasoning, path, "enabled", bool, "a boolean")
        hidden = _get(reasoning, path, "exclude", bool, "a boolean")
        tokens = _tokens(reasoning, path, "max_tokens")
        if enabled is None:
            effort, enabled = level, wanted if level is None else level != "none"
        if budget is None and tokens is not None:
            budget, param = tokens, f"{path}.max_tokens"
        shown = shown and not hidden
    return Thinking(effort, enabled, None if budget == -1 else budget, shown, param)


def _get(value: object, path: str, name: str, kind: type, words: str) -> Any:
    if not isinstance(value, dict):
        raise invalid_type(path, "an object", value)
    field = value.get(name)
    if field is not None and (
        not isinstance(field, kind) or (kind is int and isinstance(field, bool))
    ):
        raise invalid_type(f"{path}.{name}", words, field)
    return field


def _tokens(value: object, path: str, name: str) -> int | None:
    tokens: int | None = _get(value, path, name, int, "an integer")
    if tokens is not None and not 0 <= tokens <= MAX_BUDGET:
        side = "below_min" if tokens < 0 else "above_max"
        raise invalid_value(
            f"{path}.{name}",
            f"it must be from 0 to {MAX_BUDGET}, got {clip(str(tokens))}",
            f"integer_{side}_value",
        )
    return tokens


async def budget_for(
    llm: AsyncLLM,
    tokens: int | None,
    param: str,
    parsers: Parsers,
    prompt: str,
    continued: bool,
    calls: bool,
) -> ReasoningBudget | None:
    """The budget of an output that follows `prompt`; `calls` are looked for.

    RequestError, naming `param`, where the model has no format of reasoning.
    """
    if tokens is None or tokens == -1:
        return None
    if parsers.reasoning is None or llm.tokenizer is None:
        raise unsupported(param)
    reasoning = parsers.reasoning(prompt, continued)
    openers = parsers.tool.openers if parsers.tool and calls else ()
    return await asyncio.to_thread(make_budget, llm.tokenizer, reasoning, openers, tokens)


def thinking_kwargs(
    thinking: Thinking,
    given: dict[str, Any],
    variables: frozenset[str],
    efforts: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Template variables for what is wanted as far as the template reads them; those that the
    client has `given` itself stay. RequestError for a level that is none of the model's."""
    effort = thinking.effort
    if effort is not None and efforts is not None and effort not in efforts:
        raise invalid_value(
            "reasoning_effort",
            f"this model's levels are {', '.join(efforts)}, got '{effort}'",
            "unsupported_value",
        )
    values = {
        "reasoning_effort": effort,
        "enable_thinking": thinking.enabled,
        "thinking": thinking.enabled,
        "thinking_budget": thinking.budget,
    }
    return {
        name: value
        for name, value in values.items()
        if value is not None and name in variables and name not in given
    }
