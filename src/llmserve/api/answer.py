# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What both generation routes say around their choices."""

import time
from typing import Any

import msgspec
from fastapi import Request, Response

from llmserve.api.fields import GenerationBody
from llmserve.api.middleware import request_id_of
from llmserve.config.server import ServerConfig
from llmserve.core.outputs import Delta
from llmserve.frontend.async_llm import AsyncLLM

encode = msgspec.json.encode

_PLAIN_END = b',"logprobs":null,"finish_reason":null}]}\n\n'


class Answer:
    """One answer's frame: id, time, model; and how its stream was asked for."""

    def __init__(
        self,
        request: Request,
        body: GenerationBody,
        llm: AsyncLLM,
        model: str,
        server: ServerConfig,
        *,
        prefix: str,
        chunk_kind: str,
    ) -> None:
        self.request_id = request_id_of(request.scope, body.request_id)
        self.id = prefix + self.request_id
        self.created = int(time.time())
        self.model = model
        self.fingerprint = llm.model.fingerprint
        options = body.stream_options
        forced = server.enable_force_include_usage
        self.include_usage = forced or bool(options and options.include_usage)
        self.continuous_usage = self.include_usage and (
            forced or bool(options and options.continuous_usage_stats)
        )
        self.stream_interval = max(server.stream_interval, body.stream_interval)
        self._chunk_kind = chunk_kind
        self._head = b"data: " + encode(self.frame(chunk_kind))[:-1] + b',"choices":[{"index":'

    def frame(self, kind: str) -> dict[str, Any]:
        """The leading fields of a body or a chunk."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last choice, where usage was asked for."""
        if not self.include_usage:
            return b""
        body = self.frame(self._chunk_kind) | {
            "choices": [],
            "usage": usage,
            "system_fingerprint": self.fingerprint,
        }
        return b"data: " + encode(body) + b"\n\n"

    def chunk(
        self,
        index: int,
        inside: bytes,
        delta: Delta | None = None,
        *,
        logprobs: object = None,
        token_ids: bool = False,
        usage: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        """One framed chunk of one choice. `inside` is the JSON of what is new, without braces.

        `token_ids` sends the delta's; `usage` is what the tokens so far cost; `extra` are fields
        beside `choices`.
        """
        finish = delta and delta.finish_reason
        head = self._head + b"%d," % index + inside
        if not (finish or logprobs or token_ids or usage or extra):
            return head + _PLAIN_END
        choice: dict[str, Any] = {"logprobs": logprobs, "finish_reason": finish}
        if finish and delta:
            choice["stop_reason"] = delta.stop_reason
        if token_ids and delta:
            choice["token_ids"] = delta.token_ids
        rest = dict(extra or {})
        if finish and not self.include_usage:
            rest["system_fingerprint"] = self.fingerprint
        if usage:
            rest["usage"] = usage
        end = b"," + encode(rest)[1:] if rest else b"}"
        return head + b"," + encode(choice)[1:] + b"]" + end + b"\n\n"


def written(value: object) -> msgspec.Raw:
    """One of many parts of a JSON body: one at a time is there as objects, and other threads run in
    between."""
    return msgspec.Raw(encode(value))


def json_response(
    body: object, headers: dict[str, str] | None = None, status: int = 200
) -> Response:
    """A JSON body; nulls are kept."""
    return Response(encode(body), status, headers, media_type="application/json")
