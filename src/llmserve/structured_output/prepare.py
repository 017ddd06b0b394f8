# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From what a caller wrote to what is compiled, and by which engine. Imports no engine."""

import json
from typing import Any, TypeVar

import msgspec

from llmserve.core.structured_outputs import (
    MAX_SPEC_BYTES,
    GrammarKind,
    GrammarSpec,
    StructuredOutputsParams,
)
from llmserve.errors import GrammarError, RequestError
from llmserve.structured_output.known import known_document
from llmserve.structured_output.normal_form import dump, has_free_strings, num_properties
from llmserve.structured_output.regex import ascii_classes
from llmserve.structured_output.schema import MAX_SECONDS, Normalizer, OutOfTime

T = TypeVar("T")
_UNBOUND_STYLE = "minimax_m3_xml"  # xgrammar refuses bounds of its strings
_MANY_PROPERTIES = 64  # what xgrammar compiles grows with their square: 0.2 s here, 2 s for 200
_STRING_BOUNDS = ("minLength", "maxLength", "pattern", "format")
_WITH_SCHEMAS = ("items", "prefixItems", "anyOf", "additionalProperties")
_TAG_FIELDS = ("begin", "schema", "end")


class TooLong(RequestError):
    """There was not enough time."""


def prepare(
    params: StructuredOutputsParams, backend: str, seconds: float = MAX_SECONDS
) -> GrammarSpec:
    """RequestError, naming `params.param`, for what no engine can be bound to; TooLong for a schema
    that takes more than `seconds` of a core.

    `backend` is the engine to use, or "auto": xgrammar, and llguidance for what xgrammar cannot
    express or would silently weaken (see `Normalizer.hard`; anchors and look-around in a regex) and
    for many properties.
    """
    kind = params.kind
    value = getattr(params, kind)
    match kind:
        case "json":
            return _of_schema(params, _schema_of(params, value), backend, seconds)
        case "json_object":
            if value is not True:
                raise _error(params, "json_object must be true, or absent")
            return _of_schema(params, {"type": "object"}, backend, seconds)
        case "regex":
            _check_text(params, value)
            return _spec(
                params, "guidance" if backend == "auto" else backend, "regex", ascii_classes(value)
            )
        case "choice":
            if not value or not all(isinstance(text, str) and text for text in value):
                raise _error(params, "choice must be an array of one or more texts")
            lines = " | ".join(_quote(text) for text in value)
            return _spec(params, _or_xgrammar(backend), "ebnf", f"root ::= {lines}\n")
        case "grammar":
            _check_text(params, value)
            if "::=" in value:
                return _spec(params, _or_xgrammar(backend), "ebnf", value)
            return _spec(params, "guidance" if backend == "auto" else backend, "lark", value)
    return _of_tag(params, value, backend, seconds)


def _or_xgrammar(backend: str) -> str:
    return "xgrammar" if backend == "auto" else backend


def _of_schema(
    params: StructuredOutputsParams, schema: Any, backend: str, seconds: float
) -> GrammarSpec:
    normalizer = _normalizer(params, schema, seconds)
    normal = _named(params, normalizer.run)
    ignored = list(normalizer.ignored)
    if backend == "auto":
        is_large = num_properties(normal) > _MANY_PROPERTIES
        backend = "guidance" if normalizer.hard or is_large else "xgrammar"
    elif backend == "xgrammar":
        ignored += _weakened(params, normalizer)
    return _spec(params, backend, "json", dump(normal), ignored, has_free_strings(normal))


def _of_tag(
    params: StructuredOutputsParams, value: Any, backend: str, seconds: float
) -> GrammarSpec:
    tag = value
    if isinstance(value, str):
        _check_text(params, value)
        tag = _json(params, value)
    if not isinstance(tag, dict):
        raise _error(params, "a structural tag must be an object")
    ignored: list[str] = []
    if "structures" in tag:
        tag = _legacy_tag(params, tag)
    if "format" not in tag:
        raise _error(params, "a structural tag needs format, or structures and triggers")

    def normalize(part: Any) -> Any:
        if isinstance(part, list):
            return [normalize(item) for item in part]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "json_schema" and "json_schema" in part:
            normalizer = _normalizer(params, part["json_schema"], seconds)
            schema = _named(params, normalizer.run)
            ignored.extend(normalizer.ignored + _weakened(params, normalizer))
            if part.get("style") == _UNBOUND_STYLE:
                unbound: list[str] = []
                schema = _without_bounds(schema, "#", unbound)
                if unbound and params.strict:
                    raise _error(params, f"{unbound[0]} cannot be enforced in this model's format")
                ignored.extend(unbound)
            return part | {"json_schema": schema}
        return {key: normalize(item) for key, item in part.items()}

    if backend == "guidance":
        raise _error(params, "structural tags need the grammar backend xgrammar")
    text = dump({"type": "structural_tag", "format": normalize(tag["format"])})
    return _spec(params, "xgrammar", "structural_tag", text, ignored)


def _without_bounds(schema: Any, path: str, dropped: list[str]) -> Any:
    """The schema without what bounds its strings, which is named in `dropped`."""
    if isinstance(schema, list):
        return [_without_bounds(p, f"{path}/{i}", dropped) for i, p in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, part in schema.items():
        if key in _STRING_BOUNDS:
            dropped.append(f"{path}/{key}")
        elif key in ("properties", "$defs"):
            result[key] = {
                name: _without_bounds(own, f"{path}/{key}/{name}", dropped)
                for name, own in part.items()
            }
        else:
            has_schemas = key in _WITH_SCHEMAS
            result[key] = _without_bounds(part, f"{path}/{key}", dropped) if has_schemas else part
    return result


def _legacy_tag(params: StructuredOutputsParams, tag: dict[str, Any]) -> dict[str, Any]:
    structures, triggers = tag["structures"], tag.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise _error(params, "structures and triggers must be arrays")
    tags = []
    for index, item in enumerate(structures):
        if not isinstance(item, dict) or not all(field in item for field in _TAG_FIELDS):
            raise _error(params, f"structures[{index}] needs begin, schema and end")
        content = {"type": "json_schema", "json_schema": item["schema"]}
        tags.append({"begin": item["begin"], "content": content, "end": item["end"]})
    return {"format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}


def _weakened(params: StructuredOutputsParams, normalizer: Normalizer) -> list[str]:
    """What xgrammar alone does not enforce; an error where that must not be."""
    if normalizer.weak and params.strict:
        raise _error(params, f"the grammar backend xgrammar cannot enforce {normalizer.weak[0]}")
    return normalizer.weak


def _normalizer(params: StructuredOutputsParams, schema: Any, seconds: float) -> Normalizer:
    return _named(
        params,
        lambda: Normalizer(
            schema,
            strict=params.strict,
            closed=params.disable_additional_properties,
            known=known_document,
            seconds=seconds,
        ),
    )


def _schema_of(params: StructuredOutputsParams, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    _check_text(params, value)
    return _json(params, value)


def _json(params: StructuredOutputsParams, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _error(params, f"not JSON: {error}") from None


def _check_text(params: StructuredOutputsParams, text: str) -> None:
    if not text:
        raise _error(params, "it must not be empty")
    if len(text) > MAX_SPEC_BYTES:
        raise _error(params, f"it has {len(text)} characters; at most {MAX_SPEC_BYTES} may be")
    if "\0" in text:
        raise _error(params, "it must not hold NUL")


def _spec(
    params: StructuredOutputsParams,
    backend: str,
    kind: GrammarKind,
    text: str,
    ignored: list[str] | None = None,
    free_strings: bool = False,
) -> GrammarSpec:
    unread = [] if params.whitespace_pattern is None else [f"{params.param}.whitespace_pattern"]
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SPEC_BYTES:
        raise _error(params, f"{size} bytes are to be compiled; at most {MAX_SPEC_BYTES} may be")
    return GrammarSpec(
        backend=backend,
        kind=kind,
        text=text,
        compact=kind == "json" and params.disable_any_whitespace,
        param=params.param,
        ignored=list(dict.fromkeys((ignored or []) + unread)),
        free_strings=free_strings,
    )


def _quote(text: str) -> str:
    """A terminal of EBNF: JSON's escapes, which are its own too."""
    return json.dumps(text, ensure_ascii=False)


def _named(params: StructuredOutputsParams, call: Any) -> Any:
    try:
        return call()
    except GrammarError as error:
        kind = TooLong if isinstance(error, OutOfTime) else RequestError
        raise _error(params, error.message, kind) from None
    except RecursionError:
        raise _error(params, "it is nested too deeply") from None


def _error(
    params: StructuredOutputsParams, message: str, kind: type[RequestError] = RequestError
) -> RequestError:
    return kind(f"Invalid value for '{params.param}': {message}.", param=params.param)
