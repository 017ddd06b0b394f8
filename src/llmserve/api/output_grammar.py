# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What binds a chat answer: reasoning first, then calls in the model's own format, or the shape
that was asked for, or either."""

from collections.abc import Collection

from llmserve.api.fields import GenerationBody
from llmserve.api.structured import structured_outputs_of
from llmserve.api.tools import ToolUse
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.parsers.call_grammar import (
    Envelope,
    Format,
    Thought,
    calls_or,
    forced_calls,
    free_calls,
)
from llmserve.parsers.json_text import loads
from llmserve.parsers.literal_grammar import unbound
from llmserve.parsers.registry import Parsers


async def grammar_for(
    llm: AsyncLLM,
    body: GenerationBody,
    tools: ToolUse,
    parsers: Parsers,
    prompt: str,
    continued: str | None,
) -> tuple[GrammarSpec | None, bool]:
    """The grammar of a request, or None, and whether the output may think before it.

    RequestError for what cannot be enforced.
    """
    reasoning = parsers.reasoning
    thought = None
    if reasoning is not None:
        text = prompt if continued is None else continued
        thought = reasoning(text, continued is not None).thought
    asked = structured_outputs_of(body)
    params = output_params(tools, parsers, thought, asked)
    if params is None:
        return None, True
    is_tag = params is not asked
    if is_tag and asked is not None and asked.param == params.param and asked.kind != "json":
        await llm.input_processor.read_grammar(asked)  # refused in its own words, not a tag's
    try:
        return await llm.input_processor.read_grammar(params), is_tag
    except RequestError:
        if is_tag:
            await _check_parameters(llm, tools, params.strict)
        raise


async def _check_parameters(llm: AsyncLLM, tools: ToolUse, strict: bool) -> None:
    """RequestError for the first tool whose parameters cannot be enforced by themselves."""
    for index, (name, schema) in enumerate(tools.schemas.items()):
        path = f"tools[{index}].function.parameters"
        if tools.allowed is None or name in tools.allowed:
            try:
                await llm.input_processor.read_grammar(_params(_json_format(schema), path, strict))
            except RequestError as error:
                error.code = "invalid_function_parameters"
                raise


def output_params(
    tools: ToolUse,
    parsers: Parsers,
    thought: Thought | None,
    asked: StructuredOutputsParams | None,
) -> StructuredOutputsParams | None:
    """`asked` is the shape of the answer. Forced calls win over it: OpenAI's clients send both."""
    names = tools.schemas.keys() if tools.allowed is None else tools.allowed
    schemas = {name: tools.schemas[name] for name in tools.schemas if name in names}
    envelope = parsers.tool.envelope if parsers.tool else None
    if envelope is not None and envelope.literals:
        _check_literals(tools, names)
    if tools.mode == "required":
        _check_beside(asked, tools)
        envelope = _needed(envelope, "tool_choice")
        tag = forced_calls(envelope, schemas, thought, tools.parallel)
        return _params(tag, "tool_choice", bool(tools.strict & names))
    if asked is not None:
        answer = _format_of(asked, thought)
        if answer is not None and (thought is not None or tools.active):
            calls = envelope if tools.active else None
            tag = calls_or(answer, calls, schemas, thought, tools.parallel)
            return _params(tag, asked.param, asked.strict)
        if asked.kind == "grammar" and thought is not None and not thought.opener:
            raise RequestError(
                f"Unsupported value for '{asked.param}': a Lark grammar cannot come after "
                "reasoning that has begun; write it in EBNF.",
                param=asked.param,
                code="unsupported_value",
            )
        return asked
    strict = tools.strict & names
    if not tools.active or not strict:
        return None
    index = next(i for i, tool in enumerate(tools.tools) if tool["function"]["name"] in strict)
    assert parsers.tool is not None or envelope is None
    envelope = _needed(envelope, f"tools[{index}].function.strict")
    openers = parsers.tool.openers if parsers.tool else ()
    bound = {name: schemas[name] if name in strict else {} for name in schemas}
    opener = openers[0] if openers else envelope.begin.partition("{name}")[0]
    tag = free_calls(envelope, opener, bound, thought, tools.parallel)
    return _params(tag, f"tools[{index}].function.parameters", True)


def _check_literals(tools: ToolUse, names: Collection[str]) -> None:
    """A strict tool whose arguments are not written as JSON has to do with fewer keywords."""
    for index, tool in enumerate(tools.tools):
        name = tool["function"]["name"]
        if not tools.active or name not in tools.strict or name not in names:
            continue
        where = next(unbound(tools.schemas[name]), None)
        if where is not None:
            path = f"tools[{index}].function.parameters"
            raise RequestError(
                f"Invalid value for '{path}': {where} cannot be enforced in this model's format.",
                param=path,
                code="invalid_function_parameters",
            )


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


def _format_of(asked: StructuredOutputsParams, thought: Thought | None) -> Format | None:
    """The shape as part of a structural tag; None for one that stands by itself."""
    kind = asked.kind
    value = getattr(asked, kind)
    match kind:
        case "json" if isinstance(value, str):
            return None if (schema := loads(value)) is None else _json_format(schema)
        case "json":
            return _json_format(value)
        case "json_object":
            return _json_format({"type": "object"})
        case "regex":
            return {"type": "regex", "pattern": value}
        case "choice":
            texts = [{"type": "const_string", "value": text} for text in value]
            return {"type": "or", "elements": texts}
        case "grammar" if "::=" in value:
            return {"type": "grammar", "grammar": value}
        case "structural_tag" if isinstance(value, dict) and not (thought and thought.answer):
            tag: Format | None = value.get("format")
            return tag if isinstance(tag, dict) else None
    return None


def _json_format(schema: object) -> Format:
    return {"type": "json_schema", "json_schema": schema}
