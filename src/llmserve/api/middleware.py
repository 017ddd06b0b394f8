# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Pure ASGI layers, outermost first: Envelope, (CORS), Auth, BodyLimit."""

import hashlib
import hmac
import time
import uuid
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.api.errors import HttpError, error_response, internal_error
from llmserve.api.fields import valid_request_id
from llmserve.api.sse import RAW_SEND
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

PROBES = frozenset(("/health", "/health/live", "/health/ready", "/ping"))
_REQUEST_ID = "llmserve.request_id"  # in the scope: (id, whether the client brought it)


def route_path(scope: Scope) -> str:
    """The path under `root_path`, which a proxy may have stripped or not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def request_id_of(scope: Scope, named: str | None = None) -> str:
    """The client's header, else `named` by the body, else the id that the answer carries."""
    request_id: str
    request_id, from_client = scope[_REQUEST_ID]
    return request_id if from_client or named is None else named


class Envelope:
    """Ids and times on every answer, HEAD as GET, trailing slashes, and our own bugs as a 500."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wraps one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        started = False
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if valid_request_id(given) else uuid.uuid4().hex
        inner = dict(scope)
        inner[_REQUEST_ID] = (request_id, request_id == given)
        if self._root_path:
            inner["root_path"] = self._root_path
        head = scope["method"] == "HEAD"
        if head:
            inner["method"] = "GET"
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            inner["path"] = scope["path"].rstrip("/") or "/"

        async def wrapped(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
                headers["openai-processing-ms"] = str(int((time.perf_counter() - began) * 1000))
            elif head:
                message = message | {"body": b""} if isinstance(message, dict) else message
            await send(message)

        inner[RAW_SEND] = wrapped if head else send
        try:
            await self._app(inner, receive, wrapped)
        except Exception:  # boundary: a bug of ours is the client's 500 and our traceback
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await error_response(internal_error())(inner, receive, wrapped)


class Auth:
    """A key for everything but the probes."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers 401."""
        if scope["type"] != "http" or route_path(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if self._known(key):
            await self._app(scope, receive, send)
            return
        if key:
            refusal = HttpError(401, "Incorrect API key provided.", code="invalid_api_key")
        else:
            refusal = HttpError(
                401, "You didn't provide an API key: send it as 'Authorization: Bearer KEY'."
            )
        refusal.headers["www-authenticate"] = "Bearer"
        await error_response(refusal)(scope, receive, send)

    def _known(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes of the header
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class BodyLimit:
    """413 for a body over `limit` bytes, by its declared length or as its bytes arrive."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what `receive` hands out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limit:
            await error_response(self._refusal())(scope, receive, send)
            return
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> HttpError:
        return HttpError(
            413,
            f"The request body is larger than {self._limit} bytes.",
            headers={"connection": "close"},  # the rest of it is never read
        )
