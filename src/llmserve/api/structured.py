# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The fields that bind an answer to a grammar: OpenAI's, vLLM's, and the older names of others."""

from typing import Any
from urllib.parse import quote

import msgspec

from llmserve.api.errors import invalid_type, invalid_value, missing
from llmserve.api.fields import MAX_IGNORED_NAMES, GenerationBody
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import RequestError
from llmserve.frontend.async_llm import AsyncLLM

# Older names -> the field of StructuredOutputsParams: vLLM's, SGLang's, llama.cpp's.
_OLD_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "regex": "regex",
    "ebnf": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}


def structured_outputs_of(body: GenerationBody) -> StructuredOutputsParams | None:
    """What the request's fields ask for together; RequestError where they contradict each other."""
    by_format = _of_format(body.response_format)
    found = [] if by_format is None else [by_format]
    if body.structured_outputs not in (None, {}):
        own = _of_object(body.structured_outputs)
        if by_format is None:
            found.append(own)
        elif own.kind != by_format.kind:
            raise invalid_value(
                "structured_outputs",
                f"{own.kind} contradicts response_format, which asks for {by_format.kind}",
            )
    for name, kind in _OLD_NAMES.items():
        value = getattr(body, name)
        if value is None or (kind == "json_object" and value is False):
            continue
        found.append(_build({kind: value}, name))
    if len(found) > 1:
        raise invalid_value(
            found[1].param, f"{found[0].param} asks for a shape of the answer already"
        )
    return found[0] if found else None


async def grammar_of(llm: AsyncLLM, body: GenerationBody) -> GrammarSpec | None:
    """The grammar that an answer is bound to. In a thread: a schema may be large."""
    params = structured_outputs_of(body)
    return None if params is None else await llm.input_processor.read_grammar(params)


def _of_format(value: Any) -> StructuredOutputsParams | None:
    name = "response_format"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise invalid_type(name, "an object", value)
    match value.get("type"):
        case None:
            raise missing(f"{name}.type")
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True, param=name)
        case "json_schema":
            return _of_json_schema(value.get("json_schema"), name)
        case "structural_tag":
            tag = {key: part for key, part in value.items() if key != "type"}
            return StructuredOutputsParams(structural_tag=tag, strict=False, param=name)
    raise invalid_value(
        f"{name}.type", "it must be text, json_object, json_schema or structural_tag"
    )


def _of_json_schema(value: Any, name: str) -> StructuredOutputsParams:
    path = f"{name}.json_schema"
    if value is None:
        raise missing(path)
    if not isinstance(value, dict):
        raise invalid_type(path, "an object", value)
    if value.get("name") is None:
        raise missing(f"{path}.name")
    if not isinstance(value["name"], str):
        raise invalid_type(f"{path}.name", "a string", value["name"])
    strict, schema = value.get("strict"), value.get("schema")
    if not isinstance(strict, bool | None):
        raise invalid_type(f"{path}.strict", "a boolean", strict)
    if schema is None:
        return StructuredOutputsParams(json_object=True, param=name)
    if not isinstance(schema, dict | bool):
        raise invalid_type(f"{path}.schema", "an object", schema)
    return StructuredOutputsParams(json=schema, strict=bool(strict), param=name)


def _of_object(value: Any) -> StructuredOutputsParams:
    if not isinstance(value, dict):
        raise invalid_type("structured_outputs", "an object", value)
    fields = {key: part for key, part in value.items() if part is not None}
    if unknown := fields.keys() - _FIELDS:
        raise invalid_value("structured_outputs", f"there is no {min(unknown)[:64]!r} in it")
    params = _build(fields, "structured_outputs")
    assert params.kind
    return params


def _build(fields: dict[str, Any], name: str) -> StructuredOutputsParams:
    try:
        return msgspec.convert(fields | {"param": name}, StructuredOutputsParams)
    except msgspec.ValidationError as error:
        message = str(error).lower()
        raise RequestError(
            f"Invalid type for '{name}': {message}.", param=name, code="invalid_type"
        ) from None


_FIELDS = {field.name for field in msgspec.structs.fields(StructuredOutputsParams)} - {"param"}


def add_ignored(headers: dict[str, str], grammar: GrammarSpec | None) -> None:
    """Names the schema keywords that were dropped, as URI fragments, beside the ignored fields."""
    if grammar is not None and grammar.ignored:
        names = [quote(place[:200], safe="#/~$!*'()+,") for place in grammar.ignored]
        before = [headers["x-llmserve-ignored"]] if "x-llmserve-ignored" in headers else []
        headers["x-llmserve-ignored"] = ", ".join(before + names[:MAX_IGNORED_NAMES])
