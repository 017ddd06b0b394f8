# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The fields that bind an answer to a grammar: OpenAI's, vLLM's, and the older names of others."""

from collections.abc import Iterable
from types import UnionType
from typing import Any
from urllib.parse import quote

from llmserve.api.errors import clip, invalid_choice, invalid_type, invalid_value, missing
from llmserve.api.fields import MAX_IGNORED_NAMES, GenerationBody
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
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
    if body.structured_outputs is not None:
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
        _check_type(name, kind, value)
        found.append(StructuredOutputsParams(**{kind: value}, param=name))
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
    kind = value.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True, param=name)
        case "json_schema":
            return _of_json_schema(value.get("json_schema"), name)
        case "structural_tag":
            tag = {key: part for key, part in value.items() if key != "type"}
            return StructuredOutputsParams(structural_tag=tag, strict=False, param=name)
    raise invalid_choice(
        f"{name}.type", kind, ["text", "json_object", "json_schema", "structural_tag"]
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
    path = "structured_outputs"
    if not isinstance(value, dict):
        raise invalid_type(path, "an object", value)
    if unknown := value.keys() - _TYPES.keys():
        raise invalid_value(path, f"there is no '{clip(min(unknown))}' in it")
    fields = {key: part for key, part in value.items() if part is not None}
    for key, part in fields.items():
        _check_type(f"{path}.{key}", key, part)
    params = StructuredOutputsParams(**fields)
    assert params.kind
    return params


def _check_type(path: str, key: str, value: object) -> None:
    kinds, words = _TYPES[key]
    if not isinstance(value, kinds):
        raise invalid_type(path, words, value)
    for index, text in enumerate(value if isinstance(value, list) else ()):
        if not isinstance(text, str):
            raise invalid_type(f"{path}[{index}]", "a string", text)


_TYPES: dict[str, tuple[type | UnionType, str]] = {
    "json": (dict | bool | str, "an object or a string"),
    "regex": (str, "a string"),
    "choice": (list, "an array of strings"),
    "grammar": (str, "a string"),
    "json_object": (bool, "a boolean"),
    "structural_tag": (dict | str, "an object or a string"),
    "disable_any_whitespace": (bool, "a boolean"),
    "disable_additional_properties": (bool, "a boolean"),
    "whitespace_pattern": (str, "a string"),
    "strict": (bool, "a boolean"),
}


def add_ignored(headers: dict[str, str], names: Iterable[str]) -> None:
    """Names more of what has no effect, as URI fragments: schema keywords, template variables."""
    more = [quote(name[:200], safe="#/~$!*'()+,") for name in names][:MAX_IGNORED_NAMES]
    if more:
        before = [headers["x-llmserve-ignored"]] if "x-llmserve-ignored" in headers else []
        headers["x-llmserve-ignored"] = ", ".join(before + more)
