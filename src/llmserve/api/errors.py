# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Exceptions to OpenAI error bodies. Nobody else builds an error body."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from llmserve.errors import LLMServeError, NumericalError, OverloadedError, RequestError

INTERNAL_MESSAGE = "The server had an error while processing your request."
_SHOWN_CHARS = 200  # of what the client sent, in a message

_STATUS_CODES = {405: "method_not_allowed", 413: "request_too_large"}
_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "a boolean",
    "string": "a string",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
}
_JSON_WORDS: list[tuple[type, str]] = [
    (bool, "a boolean"),
    (int, "an integer"),
    (float, "a number"),
    (str, "a string"),
    (list, "an array"),
    (dict, "an object"),
    (type(None), "null"),
]


class HttpError(LLMServeError):
    """A refusal that HTTP itself knows; `headers` go onto the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code or _STATUS_CODES.get(status))
        self.status = status
        self.type = "invalid_request_error" if status < 500 else "server_error"
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def invalid_type(param: str, expected: str, value: object) -> RequestError:
    """`expected` and what came, in JSON's words."""
    got = next((word for kind, word in _JSON_WORDS if isinstance(value, kind)), "something else")
    return RequestError(
        f"Invalid type for '{param}': expected {expected}, but got {got} instead.",
        param=param,
        code="invalid_type",
    )


def invalid_value(param: str, message: str, code: str = "invalid_value") -> RequestError:
    """`message` says what would be right."""
    return RequestError(f"Invalid value for '{param}': {message}", param=param, code=code)


def invalid_choice(param: str, value: object, choices: Iterable[str]) -> RequestError:
    """`value` is none of a few texts."""
    if value is None:
        return missing(param)
    if not isinstance(value, str):
        return invalid_type(param, "a string", value)
    return invalid_value(param, f"supported values are {', '.join(choices)}, got '{clip(value)}'")


def missing(param: str) -> RequestError:
    """A required field that is absent or null."""
    return RequestError(
        f"Missing required parameter: '{param}'.",
        param=param,
        code="missing_required_parameter",
    )


def unsupported(param: str) -> RequestError:
    """A field that would change the answer and is not built yet."""
    return RequestError(
        f"Unsupported parameter: '{param}' is not supported by this server.",
        param=param,
        code="unsupported_parameter",
    )


def clip(text: str) -> str:
    """Client text as it may stand in a message."""
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def from_validation(details: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's complaints as OpenAI would word it."""
    detail = details[0]
    kind: str = detail["type"]
    param = _path(detail["loc"])
    value, limits = detail["input"], detail.get("ctx", {})
    got = f"got {clip(str(value))}"
    if kind == "missing":
        return missing(param)
    if kind == "int_from_float":
        return invalid_type(param, "an integer", value)
    if kind.endswith("_type"):
        return invalid_type(param, _TYPE_WORDS.get(kind.removesuffix("_type"), "another"), value)
    family = "decimal" if any(isinstance(limit, float) for limit in limits.values()) else "integer"
    for name, words in (("ge", "at least"), ("gt", "greater than")):
        if name in limits:
            return invalid_value(
                param,
                f"it must be {words} {limits[name]}, {got}",
                f"{family}_below_min_value",
            )
    if "le" in limits:
        return invalid_value(
            param, f"it must be at most {limits['le']}, {got}", f"{family}_above_max_value"
        )
    if kind in ("string_too_long", "too_long"):
        family = "string" if isinstance(value, str) else "array"
        return invalid_value(
            param,
            f"its length must be at most {limits['max_length']}, got {len(value)}",
            f"{family}_above_max_length",
        )
    if kind in ("string_too_short", "too_short"):
        family = "string" if isinstance(value, str) else "array"
        return invalid_value(param, "it must not be empty", f"{family}_below_min_length")
    if kind == "literal_error":
        return invalid_choice(param, value, re.findall("'([^']+)'", limits["expected"]))
    if kind == "extra_forbidden":
        return invalid_value(param, "there is no such field", "unknown_parameter")
    return invalid_value(param, detail["msg"])


def _path(loc: Sequence[str | int]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def error_object(error: LLMServeError) -> dict[str, Any]:
    """What stands under `error`, in a body or in an event."""
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }


def error_body(error: LLMServeError) -> bytes:
    """The JSON body."""
    return msgspec.json.encode({"error": error_object(error)})


def error_event(error: LLMServeError) -> bytes:
    """The one event that ends a stream that failed; nothing follows it."""
    return b"data: " + error_body(error) + b"\n\n"


def error_headers(error: LLMServeError) -> dict[str, str]:
    """What a client's retry logic reads."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        headers.update(error.headers)
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(min(60, max(1, error.retry_after)))
        if error.code == "draining":
            headers["connection"] = "close"
    if isinstance(error, NumericalError):
        headers["x-should-retry"] = "false"  # the same request gives the same logits
    return headers


def error_response(error: LLMServeError) -> Response:
    """The whole answer."""
    return Response(
        error_body(error), error.status, error_headers(error), media_type="application/json"
    )


def internal_error() -> LLMServeError:
    """What a client may know of a bug of ours."""
    return LLMServeError(INTERNAL_MESSAGE)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LLMServeError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    where = f"{request.method} {clip(request.url.path)}"
    if error.status_code == 404:
        message = f"Unknown request URL: {where}."
    elif error.status_code == 405:
        message = f"Not allowed method: {where}."
    else:
        message = str(error.detail)
    return error_response(HttpError(error.status_code, message, headers=error.headers))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Every exception that may leave a route gets its body."""
    app.add_exception_handler(LLMServeError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
