# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The table of cases: status, type, code, param, headers, and the official client's exception."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

from llmserve.api.errors import (
    ClientGone,
    HttpError,
    clip,
    error_body,
    error_event,
    error_headers,
    from_validation,
    internal_error,
)
from llmserve.core.messages import RequestExtra
from llmserve.errors import NumericalError, OverloadedError, RequestError
from tests.helpers.api import MODEL, Api, open_api

MESSAGES = [{"role": "user", "content": "hi"}]
INVALID = "invalid_request_error"


@dataclass
class Case:
    """A request and what it must be answered with."""

    name: str
    status: int
    code: str | None
    param: str | None
    exception: type[openai.APIStatusError]
    type: str = INVALID
    method: str = "POST"
    path: str = "/v1/chat/completions"
    body: Any = None
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=lambda: {"authorization": "Bearer key"})
    answer_headers: dict[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    failure: RequestExtra | None = None
    phase: str = "ready"  # of the server; "dead" and "bug" are its engine's


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": MESSAGES} | fields


BAD = openai.BadRequestError
CASES = [
    Case("no JSON", 400, None, None, BAD, content=b"{", words=("line 1 column 2",)),
    Case("empty", 400, None, None, BAD, content=b"", words=("it is empty",)),
    Case("NaN", 400, None, None, BAD, content=b'{"n": NaN}', words=("NaN", "line 1 column 7")),
    Case("no object", 400, None, None, BAD, content=b"[]", words=("must be a JSON object",)),
    Case(
        "content type",
        400,
        None,
        None,
        BAD,
        content=b"{}",
        headers={"authorization": "Bearer key", "content-type": "text/plain"},
        words=("application/json",),
    ),
    Case("field missing", 400, "missing_required_parameter", "messages", BAD, body={}),
    Case(
        "role missing",
        400,
        "missing_required_parameter",
        "messages[1].role",
        BAD,
        body=chat(messages=[*MESSAGES, {"content": "x"}]),
    ),
    Case(
        "wrong type",
        400,
        "invalid_type",
        "stream",
        BAD,
        body=chat(stream="x"),
        words=("expected a boolean", "a string"),
    ),
    Case(
        "wrong type inside",
        400,
        "invalid_type",
        "messages[0].content[1].text",
        BAD,
        body=chat(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": 5}],
                }
            ]
        ),
        words=("expected a string", "an integer"),
    ),
    Case(
        "bad enum value",
        400,
        "invalid_value",
        "messages[0].role",
        BAD,
        body=chat(messages=[{"role": "robot", "content": "x"}]),
    ),
    Case(
        "number too large",
        400,
        "integer_above_max_value",
        "n",
        BAD,
        body=chat(n=999),
        words=("128", "999"),
    ),
    Case(
        "number too small",
        400,
        "decimal_below_min_value",
        "min_p",
        BAD,
        body=chat(min_p=-1),
        words=("0", "-1"),
    ),
    Case(
        "list too long",
        400,
        "array_above_max_length",
        "stop",
        BAD,
        body=chat(stop=["x"] * 99),
        words=("16", "99"),
    ),
    Case(
        "not built",
        400,
        "unsupported_parameter",
        "functions",
        BAD,
        body=chat(functions=[{"name": "f"}]),
        words=("functions",),
    ),
    Case(
        "an image",
        400,
        "unsupported_parameter",
        "messages[0].content[0].type",
        BAD,
        body=chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        words=("image_url",),
    ),
    Case(
        "unknown model",
        404,
        "model_not_found",
        "model",
        openai.NotFoundError,
        body=chat(model="gone"),
        words=("gone", MODEL),
    ),
    Case(
        "prompt over the context",
        400,
        "context_length_exceeded",
        "messages",
        BAD,
        body=chat(messages=[{"role": "user", "content": "x" * 300}]),
        words=("maximum context length is 256 tokens", "322 tokens"),
    ),
    Case(
        "prompt ids over the context",
        400,
        "context_length_exceeded",
        "prompt",
        BAD,
        path="/v1/completions",
        body={"prompt": [1] * 300},
        words=("maximum context length is 256 tokens", "300 tokens"),
    ),
    Case(
        "max_tokens alone over the context",
        400,
        "integer_above_max_value",
        "max_completion_tokens",
        BAD,
        body=chat(max_completion_tokens=257),
        words=("256", "257"),
    ),
    Case(
        "more prompts than there may be",
        400,
        "array_above_max_length",
        "prompt",
        BAD,
        path="/v1/completions",
        body={"prompt": ["x"] * 1025},
        words=("1024", "1025"),
    ),
    Case(
        "stream_options without stream",
        400,
        "invalid_value",
        "stream_options",
        BAD,
        body=chat(stream_options={"include_usage": True}),
        words=("stream=true",),
    ),
    Case(
        "a suffix",
        400,
        "unsupported_parameter",
        "suffix",
        BAD,
        path="/v1/completions",
        body={"prompt": "x", "suffix": "y"},
    ),
    Case(
        "legacy functions",
        400,
        "unsupported_parameter",
        "functions",
        BAD,
        body=chat(functions=[{"name": "f"}]),
    ),
    Case(
        "spoken answers",
        400,
        "unsupported_parameter",
        "modalities",
        BAD,
        body=chat(modalities=["text", "audio"]),
    ),
    Case("n greedy answers", 400, "invalid_value", "n", BAD, body=chat(n=2, temperature=0)),
    Case(
        "too many logprobs",
        400,
        "integer_above_max_value",
        "top_logprobs",
        BAD,
        body=chat(logprobs=True, top_logprobs=21),
        words=("top_logprobs", "20"),
    ),
    Case(
        "no key",
        401,
        None,
        None,
        openai.AuthenticationError,
        body=chat(),
        headers={},
        answer_headers={"www-authenticate": "Bearer"},
    ),
    Case(
        "wrong key",
        401,
        "invalid_api_key",
        None,
        openai.AuthenticationError,
        body=chat(),
        headers={"x-api-key": "other"},
        answer_headers={"www-authenticate": "Bearer"},
    ),
    Case(
        "queue full",
        503,
        "server_is_overloaded",
        None,
        openai.InternalServerError,
        type="service_unavailable_error",
        body=chat(),
        failure=RequestExtra(
            finish_reason="error", error="server_is_overloaded", message="the queue is full"
        ),
        answer_headers={"retry-after": "1"},
    ),
    Case(
        "NaN logits",
        500,
        "numerical_error",
        None,
        openai.InternalServerError,
        type="server_error",
        body=chat(),
        failure=RequestExtra(finish_reason="error", error="numerical_error", message="NaN"),
        answer_headers={"x-should-retry": "false"},
    ),
    Case(
        "engine gone",
        503,
        "engine_restarted",
        None,
        openai.InternalServerError,
        type="service_unavailable_error",
        body=chat(),
        failure=RequestExtra(finish_reason="error", error="engine_restarted", message="gone"),
    ),
    *[
        Case(
            name,
            503,
            code,
            None,
            openai.InternalServerError,
            type="service_unavailable_error",
            body=chat(),
            phase=name,
            answer_headers=headers,
        )
        for name, code, headers in (
            ("starting", "starting", {"retry-after": "1"}),
            ("draining", "draining", {"retry-after": "1", "connection": "close"}),
            ("dead", "engine_dead", {}),
        )
    ],
    Case(
        "bug",
        500,
        None,
        None,
        openai.InternalServerError,
        type="server_error",
        body=chat(),
        phase="bug",
        words=("The server had an error",),
    ),
    Case(
        "unknown model, asked for",
        404,
        "model_not_found",
        "model",
        openai.NotFoundError,
        method="GET",
        path="/v1/models/gone",
        words=("gone", MODEL),
    ),
    Case(
        "unknown URL",
        404,
        None,
        None,
        openai.NotFoundError,
        method="GET",
        path="/v1/nothing",
        words=("GET", "/v1/nothing"),
    ),
    Case(
        "wrong method",
        405,
        "method_not_allowed",
        None,
        openai.APIStatusError,
        method="GET",
        answer_headers={"allow": "POST"},
    ),
    Case(
        "body too large",
        413,
        "request_too_large",
        None,
        openai.APIStatusError,
        content=b" " * 20_001,
    ),
    Case(
        "compressed body",
        415,
        None,
        None,
        openai.APIStatusError,
        content=b"{}",
        headers={
            "authorization": "Bearer key",
            "content-type": "application/json",
            "content-encoding": "zstd",
        },
    ),
]


async def answer_to(api: Api, case: Case) -> httpx.Response:
    if case.phase in ("starting", "draining"):
        api.state.phase = case.phase  # type: ignore[assignment]
    if case.phase == "dead":
        api.engine.die()
        await asyncio.sleep(0.01)
    if case.phase == "bug":
        api.engine.answer = lambda request: 1 / 0  # type: ignore[return-value]
    if case.failure is not None:
        api.engine.fail_at, api.engine.failure = 0, case.failure
    if case.content is not None:
        headers = {"content-type": "application/json"} | case.headers
        return await api.client.request(
            case.method, case.path, content=case.content, headers=headers
        )
    return await api.client.request(case.method, case.path, json=case.body, headers=case.headers)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_case(case: Case) -> None:
    async with open_api(api_key=["key"], max_request_bytes=20_000) as api:
        answer = await answer_to(api, case)
        assert answer.status_code == case.status, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]
        assert list(answer.json()) == ["error"]
        error = answer.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert (error["type"], error["code"], error["param"]) == (case.type, case.code, case.param)
        for word in case.words:
            assert word in error["message"]
        assert case.answer_headers.items() <= dict(answer.headers).items()
        raised = openai.AsyncOpenAI(api_key="key", http_client=api.client)._make_status_error(
            error["message"], body=error, response=answer
        )
        assert type(raised) is case.exception
        assert (raised.code, raised.param) == (case.code, case.param)


def test_long_client_text_is_clipped() -> None:
    assert clip("x" * 200) == "x" * 200
    assert clip("x" * 201) == "x" * 200 + "..."


async def test_a_404_shows_no_more_than_a_clip_of_its_path() -> None:
    async with open_api() as api:
        assert len((await api.client.get("/" + "x" * 5000)).text) < 500


def test_headers_for_retry_logic() -> None:
    assert error_headers(OverloadedError("x", retry_after=500)) == {"retry-after": "60"}
    assert error_headers(OverloadedError("x", code="draining"))["connection"] == "close"
    assert error_headers(NumericalError("x")) == {"x-should-retry": "false"}
    assert error_headers(HttpError(405, "x", headers={"allow": "GET"})) == {"allow": "GET"}
    assert error_headers(RequestError("x")) == {}


def test_an_event_holds_the_same_object_as_a_body() -> None:
    error = RequestError("no", param="a[0]", code="c")
    assert error_event(error) == b"data: " + error_body(error) + b"\n\n"


def test_internal_errors_say_nothing_of_their_cause() -> None:
    assert b'"code":null' in error_body(internal_error())
    assert internal_error().status == 500
    assert not issubclass(ClientGone, RequestError)


def test_only_the_first_complaint_is_told() -> None:
    details = [
        {"type": "missing", "loc": ("a", 0, "b"), "input": {}},
        {"type": "int_type", "loc": ("c",), "input": "x"},
    ]
    assert from_validation(details).param == "a[0].b"
