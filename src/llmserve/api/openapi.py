# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The server's description of itself. Routes name the schemas of what they read and answer.

Bodies are parsed and written by the routes themselves, so FastAPI knows neither; a schema says
what is always there, and leaves additions open.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from llmserve.api.chat_messages import ROLES
from llmserve.api.fields import INT64_MAX, MAX_LOGIT_BIAS, RequestBody
from llmserve.core.sampling_params import MAX_STOP_STRINGS

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
_NULL: Schema = {"type": "null"}


def nullable(schema: Schema) -> Schema:
    """`schema` or null."""
    return {"anyOf": [schema, _NULL]}


def array(items: Schema) -> Schema:
    """A list of `items`."""
    return {"type": "array", "items": items}


def fields(**properties: Schema) -> Schema:
    """An object that has all of `properties`, and may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def constant(value: str) -> Schema:
    """One string."""
    return {"type": "string", "enum": [value]}


ERROR = fields(
    error=fields(message=STRING, type=STRING, param=nullable(STRING), code=nullable(STRING))
)
USAGE = fields(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=fields(cached_tokens=INTEGER),
)
FINISH_REASON = nullable(STRING)


def _top(token: Schema) -> Schema:
    return fields(token=token, logprob=NUMBER, bytes=nullable(array(INTEGER)))


def _generated(kind: str, prefix: str, choice: Schema) -> Schema:
    return fields(
        id={"type": "string", "pattern": f"^{prefix}"},
        object=constant(kind),
        created=INTEGER,
        model=STRING,
        choices=array(choice),
        system_fingerprint=STRING,
        usage=USAGE,
    )


CHAT = _generated(
    "chat.completion",
    "chatcmpl-",
    fields(
        index=INTEGER,
        message=fields(role=STRING, content=nullable(STRING), refusal=nullable(STRING)),
        logprobs=nullable(
            fields(
                content=nullable(
                    array(
                        {
                            "allOf": [
                                _top(STRING),
                                fields(top_logprobs=array(_top(STRING))),
                            ]
                        }
                    )
                )
            )
        ),
        finish_reason=FINISH_REASON,
    ),
)
COMPLETION = _generated(
    "text_completion",
    "cmpl-",
    fields(
        index=INTEGER,
        text=STRING,
        logprobs=nullable(
            fields(
                text_offset=array(INTEGER),
                token_logprobs=array(nullable(NUMBER)),
                tokens=array(STRING),
                top_logprobs=array(nullable({"type": "object", "additionalProperties": NUMBER})),
            )
        ),
        finish_reason=FINISH_REASON,
    ),
)
MODEL = fields(
    id=STRING, object=constant("model"), created=INTEGER, owned_by=STRING, max_model_len=INTEGER
)
MODELS = fields(object=constant("list"), data=array(MODEL))
TOKENS = fields(
    count=INTEGER, max_model_len=INTEGER, tokens=array(INTEGER), token_strs=nullable(array(STRING))
)
TEXT = fields(prompt=STRING)


_TOKEN_IDS = array({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}) | {"minItems": 1}
PROMPT: Schema = {
    "anyOf": [STRING, _TOKEN_IDS, array({"anyOf": [STRING, _TOKEN_IDS]}) | {"minItems": 1}]
}
_PART = fields(type=constant("text"), text=STRING)
_MESSAGE = fields(
    role={"type": "string", "enum": list(ROLES)}, content={"anyOf": [STRING, array(_PART)]}
)
MESSAGES = array(_MESSAGE) | {"minItems": 1}
_TEXT = STRING | {"minLength": 1}
# Fields whose type in a model is the one after reading.
_AS_SENT: dict[str, Schema] = {
    "stop": nullable({"anyOf": [_TEXT, array(_TEXT) | {"maxItems": MAX_STOP_STRINGS}]}),
    "logit_bias": nullable(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {
                "type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS
            },
        }
    ),
}  # fmt: skip


def described(
    answer: Schema | None = None,
    body: type[RequestBody] | None = None,
    *,
    media_type: str = "application/json",
    streams: bool = False,
    **by_hand: Schema,
) -> Schema:
    """A route's `openapi_extra`. Without `answer` its 200 has no body.

    `by_hand` are fields that the route checks itself; those that may not be null are required.
    """
    content: dict[str, Any] = {} if answer is None else {media_type: {"schema": answer}}
    if streams:
        content["text/event-stream"] = {"schema": fields(data=STRING)}  # of each event
    extra: Schema = {"responses": {"200": {"content": content}}}
    if body is not None:
        schema = body.model_json_schema()
        for name, as_sent in (_AS_SENT | by_hand).items():
            if name in schema["properties"]:
                schema["properties"][name] = as_sent
        needed = [name for name, one in by_hand.items() if _NULL not in one.get("anyOf", [])]
        schema["required"] = [*schema.get("required", []), *needed]
        content = {"application/json": {"schema": schema}}
        extra["requestBody"] = {"required": True, "content": content}
    return extra


def install(app: FastAPI) -> None:
    """/openapi.json with our errors in place of FastAPI's, and schemas where $ref finds them."""

    def openapi() -> Schema:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            shared: dict[str, Schema] = {"Error": ERROR}
            for methods in document["paths"].values():
                for operation in methods.values():
                    _finish(operation, shared)
            document["components"] = {"schemas": shared}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _finish(operation: Schema, shared: dict[str, Schema]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # no route answers that
    content = responses["200"].get("content", {})
    if content.get("application/json", {}).get("schema") == {}:
        del content["application/json"]
    if not content:
        responses["200"].pop("content", None)
    responses["default"] = {
        "description": "What went wrong",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        shared.update(body["schema"].pop("$defs", {}))
        body["schema"] = _with_whole_limits(_moved(body["schema"]))
        for name in list(shared):
            shared[name] = _moved(shared[name])


def _moved(schema: Any) -> Any:
    """`schema` with its references to $defs led to where those were moved."""
    if isinstance(schema, Mapping):
        return {
            key: value.replace("#/$defs/", "#/components/schemas/")
            if key == "$ref" and isinstance(value, str)
            else _moved(value)
            for key, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list) else schema


def _with_whole_limits(schema: Any) -> Any:
    """Limits of integers come as floats, which rounds 2^63 - 1 up."""
    if isinstance(schema, dict):
        whole = schema.get("type") == "integer"
        return {
            key: max(-(2**63), min(INT64_MAX, int(value)))
            if whole and key in ("minimum", "maximum")
            else _with_whole_limits(value)
            for key, value in schema.items()
        }
    return [_with_whole_limits(item) for item in schema] if isinstance(schema, list) else schema
