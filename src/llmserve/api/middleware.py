# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Pure ASGI layers, outermost first: Envelope, HostCheck, (CORS), Auth, Gate, BodyLimit."""

import hashlib
import hmac
import ipaddress
import re
import time
import uuid
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.api.errors import HttpError, clip, error_response, internal_error
from llmserve.api.fields import valid_request_id
from llmserve.api.json_bounds import JsonBounds
from llmserve.api.sse import RAW_SEND
from llmserve.api.state import AppState
from llmserve.errors import LLMServeError, RequestError
from llmserve.frontend.caller import CALLER, Caller
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

PROBES = frozenset(("/health", "/health/live", "/health/ready", "/ping"))
UNQUEUED = frozenset(("/tokenize", "/detokenize"))  # POSTs that the engine never hears of
_MAX_TIMEOUT_MS = 24 * 3600 * 1000
_KEY = "llmserve.key"  # in the scope: the index of the API key
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

        inner[RAW_SEND] = wrapped if head else scope.get(RAW_SEND, send)
        try:
            await self._app(inner, receive, wrapped)
        except Exception:  # boundary: a bug of ours is the client's 500 and our traceback
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await error_response(internal_error())(inner, receive, wrapped)


class HostCheck:
    """403 for a Host that a page of somebody else may have brought here by DNS rebinding.

    Which needs a name: IP addresses pass, and so does a request without the header, which no
    browser sends. `names` are the names that pass besides localhost.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], refused: Callable[[str], None]) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names) | {"localhost", ""}
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers 403."""
        if scope["type"] != "http" or self._passes(Headers(scope=scope).getlist("host")):
            await self._app(scope, receive, send)
            return
        self._refused("host")
        refusal = HttpError(
            403, "This server does not go by the name in Host (see --allowed-hosts).", code="host"
        )
        await error_response(refusal)(scope, receive, send)

    def _passes(self, hosts: list[str]) -> bool:
        if len(hosts) > 1:
            return False
        host = hosts[0].lower() if hosts else ""
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Auth:
    """A key for everything but the probes."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], refused: Callable[[str], None]) -> None:
        self._app = app
        self._digests = key_digests(keys)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass, or answers 401."""
        if scope["type"] != "http" or route_path(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        index = self._index(key)
        if index is not None:
            await self._app(dict(scope) | {_KEY: index}, receive, send)
            return
        self._refused("unauthorized")
        if key:
            refusal = HttpError(401, "Incorrect API key provided.", code="invalid_api_key")
        else:
            refusal = HttpError(
                401, "You didn't provide an API key: send it as 'Authorization: Bearer KEY'."
            )
        refusal.headers["www-authenticate"] = "Bearer"
        await error_response(refusal)(scope, receive, send)

    def _index(self, key: str) -> int | None:
        digest = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes of the header
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if any(matches) else None


def key_digests(keys: Iterable[str]) -> list[bytes]:
    """SHA-256 of each API key, equal ones once."""
    return list(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in keys if key))


class Gate:
    """A place for each request that may reach the engine, looked for before its body is read and
    taken when it is there: who sends slowly keeps no place from others.

    `salts` are what each key's cached prefixes go by, none where all share them.
    """

    def __init__(self, app: ASGIApp, state: AppState, salts: list[bytes]) -> None:
        self._app = app
        self._state = state
        self._salts = salts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request pass on behalf of its caller, or answers 400, 429 or 503."""
        path = route_path(scope) if scope["type"] == "http" else ""
        if scope["type"] != "http" or scope["method"] != "POST" or path in PROBES | UNQUEUED:
            await self._app(scope, receive, send)
            return
        key: int = scope.get(_KEY, 0)
        try:
            caller = self._caller(key, Headers(scope=scope).get("x-request-timeout-ms"))
            self._state.check_place(key)
        except LLMServeError as error:
            await error_response(error)(scope, receive, send)
            return
        taken = False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            if not (taken or message.get("more_body") or message["type"] != "http.request"):
                self._state.take_place(key)
                taken = True
            return message

        token = CALLER.set(caller)
        try:
            await self._app(scope, counted, send)
        finally:
            CALLER.reset(token)
            if taken:
                self._state.leave_place(key)

    def _caller(self, key: int, timeout_ms: str | None) -> Caller:
        times = [self._state.server.request_timeout] if self._state.server.request_timeout else []
        if timeout_ms is not None:
            number = re.fullmatch("[0-9]{1,8}", timeout_ms)
            if number is None or not 1 <= int(timeout_ms) <= _MAX_TIMEOUT_MS:
                raise self._bad_timeout(timeout_ms)
            times.append(int(timeout_ms) / 1000)
        return Caller(
            deadline=time.monotonic() + min(times) if times else 0.0,
            tenant=key,
            salt=self._salts[key] if self._salts else b"",
            least_priority=0,
        )

    def _bad_timeout(self, given: str) -> RequestError:
        self._state.metrics.edge.refuse("deadline_header")
        return RequestError(
            f"X-Request-Timeout-Ms must be an integer from 1 to {_MAX_TIMEOUT_MS}, "
            f"got '{clip(given)}'.",
            param="X-Request-Timeout-Ms",
            code="invalid_value",
        )


class BodyLimit:
    """413 for a body over `limit` bytes, by its declared length or as its bytes arrive; 400 for
    JSON beyond JsonBounds."""

    def __init__(self, app: ASGIApp, limit: int, refused: Callable[[str], None]) -> None:
        self._app = app
        self._limit = limit
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what `receive` hands out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limit:
            await error_response(self._refusal())(scope, receive, send)
            return
        seen = 0
        bounds = JsonBounds() if "json" in headers.get("content-type", "").lower() else None

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise self._refusal()
            if bounds is not None and (body := message.get("body")):
                try:
                    bounds.feed(body)
                except RequestError:
                    self._refused("json_bounds")
                    raise
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> HttpError:
        self._refused("body_too_large")
        return HttpError(
            413,
            f"The request body is larger than {self._limit} bytes.",
            headers={"connection": "close"},  # the rest of it is never read
        )
