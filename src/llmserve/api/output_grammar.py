# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What binds a chat answer: reasoning first, then calls in the model's own format, or the shape
that was asked for, or either."""

from collections.abc import Mapping
from typing import Any

from llmserve.api.fields import GenerationBody
from llmserve.api.structured import structured_outputs_of
from llmserve.api.tools import ToolUse
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.parsers.call_grammar import Envelope, Format, calls_or, forced_calls, free_calls
from llmserve.parsers.registry import Parsers


async def grammar_for(
    llm: AsyncLLM,
    body: GenerationBody,
    tools: ToolUse,
    parsers: Parsers,
    prompt: str,
    continued: str | None,
) -> GrammarSpec | None:
    """The grammar of a request, or None. RequestError for what cannot be enforced."""
    reasoning = parsers.reasoning
    thought = None
    if reasoning is not None:
        text = prompt if continued is None else continued
        thought = reasoning(text, continued is not None).thought
    params = output_params(tools, parsers, thought, structured_outputs_of(body))
    return None if params is None else await llm.input_processor.read_grammar(params)


def output_params(
    tools: ToolUse,
    parsers: Parsers,
    thought: tuple[str, str] | None,
    asked: StructuredOutputsParams | None,
) -> StructuredOutputsParams | None:
    """`asked` is the shape of the answer. Forced calls win over it: OpenAI's clients send both."""
    names = tools.schemas.keys() if tools.allowed is None else tools.allowed
    schemas = {name: tools.schemas[name] for name in tools.schemas if name in names}
    envelope = parsers.tool.envelope if parsers.tool else None
    if tools.mode == "required":
        _check_beside(asked, tools)
        envelope = _needed(envelope, "tool_choice")
        tag = forced_calls(envelope, schemas, thought, tools.parallel)
        return _params(tag, "tool_choice", bool(tools.strict & names))
    answer = None if asked is None else _format_of(asked)
    if asked is not None and (answer is None or (thought is None and not tools.active)):
        return asked
    if asked is not None and answer is not None:
        calls = envelope if tools.active else None
        tag = calls_or(answer, calls, schemas, thought, tools.parallel)
        return _params(tag, asked.param, asked.strict)
    strict = tools.strict & names
    if not tools.active or not strict:
        return None
    index = next(i for i, tool in enumerate(tools.tools) if tool["function"]["name"] in strict)
    param = f"tools[{index}].function.strict"
    assert parsers.tool is not None or envelope is None
    envelope = _needed(envelope, param)
    openers = parsers.tool.openers if parsers.tool else ()
    bound = {name: schemas[name] if name in strict else {} for name in schemas}
    return _params(free_calls(envelope, openers[0], bound, tools.parallel), param, True)


def _params(tag: Format, param: str, strict: bool) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag={"format": tag}, strict=strict, param=param)


def _needed(envelope: Envelope | None, param: str) -> Envelope:
    if envelope is None:
        raise RequestError(
            f"Unsupported value for '{param}': calls in this model's format cannot be enforced.",
            param=param,
            code="unsupported_value",
        )
    return envelope


def _check_beside(asked: StructuredOutputsParams | None, tools: ToolUse) -> None:
    if asked is not None and asked.param != "response_format":
        raise RequestError(
            f"Invalid value for '{asked.param}': it contradicts tool_choice, which forces a call",
            param=asked.param,
            code="invalid_value",
        )


def _format_of(asked: StructuredOutputsParams) -> Format | None:
    """The shape as part of a structural tag; None for one that stands by itself."""
    kinds: Mapping[str, Any] = {
        "json": lambda value: {"type": "json_schema", "json_schema": value},
        "json_object": lambda value: {"type": "json_schema", "json_schema": {"type": "object"}},
        "regex": lambda value: {"type": "regex", "pattern": value},
        "choice": lambda value: {
            "type": "or",
            "elements": [{"type": "const_string", "value": text} for text in value],
        },
    }
    kind = asked.kind
    value = getattr(asked, kind)
    if kind not in kinds or (kind == "json" and isinstance(value, str)):
        return None
    made: Format = kinds[kind](value)
    return made
