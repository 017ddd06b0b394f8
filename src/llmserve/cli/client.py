# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A small client of a running server, for the terminal commands."""

import http.client
import json
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

from llmserve import envs
from llmserve.errors import ConfigError, LLMServeError

DEFAULT_URL = "http://127.0.0.1:8000/v1"


class Client:
    """Speaks to `url` (with or without `/v1`); errors come out as one-line LLMServeErrors."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url must look like {DEFAULT_URL}, got {url!r}")
        self.url = url
        self._parts = parts
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        key = api_key or envs.API_KEY
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def model(self) -> str:
        """The first model that the server names."""
        models = self.call("GET", "/v1/models")["data"]
        if not models:
            raise ConfigError(f"the server at {self.url} has no model")
        return str(models[0]["id"])

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request; the decoded JSON of its answer, None for an empty one."""
        connection, response = self._send(method, path, body)
        try:
            data = response.read()
        finally:
            connection.close()
        return json.loads(data) if data else None

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer. Closing the iterator drops the request."""
        connection, response = self._send("POST", path, body | {"stream": True})
        try:
            while line := response.readline():
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise LLMServeError(event["error"]["message"])
                    yield event
            raise ConnectionResetError
        except (OSError, http.client.HTTPException):
            raise LLMServeError(f"the server at {self.url} ended the answer early") from None
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: object
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = (
            http.client.HTTPSConnection
            if self._parts.scheme == "https"
            else http.client.HTTPConnection
        )
        host = self._parts.hostname
        assert host is not None
        connection = kind(host, self._parts.port, timeout=self._timeout)
        data = None if body is None else json.dumps(body)
        headers = self._headers | ({"Content-Type": "application/json"} if data else {})
        try:
            connection.request(method, self._prefix + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            raise LLMServeError(
                f"no answer from {self.url}: {reason} (start a server with `llmserve serve`)"
            ) from None
        if response.status >= 400:
            text = response.read().decode(errors="replace")
            connection.close()
            raise LLMServeError(f"{response.status} from {self.url}: {error_message(text)}")
        return connection, response


def lines() -> Iterator[str]:
    """What the user types, line by line, until the input ends."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def error_message(body: str) -> str:
    """The message of an OpenAI error body, or the body's first line."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip().partition("\n")[0][:200]
