# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A small client of a running server, for the terminal commands."""

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from llmserve import envs
from llmserve.errors import ConfigError, LLMServeError

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def split_url(url: str, flag: str = "--url") -> tuple[SplitResult, str, int]:
    """A server's address, its host and port; ConfigError, naming `flag`, for anything else."""
    with contextlib.suppress(ValueError):  # of a port or an IPv6 address that is none
        parts = urlsplit(url)
        default = {"http": 80, "https": 443}.get(parts.scheme)
        if default and parts.hostname:
            return parts, parts.hostname, parts.port or default
    raise ConfigError(f"{flag} must look like {DEFAULT_URL}, got {url!r}")


class Client:
    """Speaks to `url` (with or without `/v1`); errors come out as one-line LLMServeErrors."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        parts, self._host, self._port = split_url(url if "://" in url else f"http://{url}")
        self.url = url
        self._parts = parts
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        key = api_key or envs.API_KEY
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key must be of printable ASCII characters")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def model(self) -> str:
        """The first model that the server names."""
        try:
            return str(self.call("GET", "/v1/models")["data"][0]["id"])
        except (KeyError, TypeError):
            raise self._stranger() from None
        except IndexError:
            raise ConfigError(f"the server at {self.url} has no model") from None

    def call(self, method: str, path: str, body: object = None) -> Any:
        """One request; the decoded JSON of its answer, None for an empty one."""
        connection, response = self._send(method, path, body)
        try:
            data = response.read()
            return json.loads(data) if data else None
        except (OSError, http.client.HTTPException):
            raise LLMServeError(f"the server at {self.url} ended the answer early") from None
        except ValueError:
            raise self._stranger() from None
        finally:
            connection.close()

    def _stranger(self) -> LLMServeError:
        return LLMServeError(f"the server at {self.url} does not speak the OpenAI API")

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
        except ValueError:
            raise self._stranger() from None
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
        connection = kind(self._host, self._port, timeout=self._timeout)
        data = None
        if body is not None:  # typed bytes that are no UTF-8 came as surrogates: no JSON
            typed = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
            data = typed.decode("utf-8", "replace").encode()
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
            text = ""
            with contextlib.suppress(OSError, http.client.HTTPException):  # the status says enough
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
