# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat messages of a body, checked and flattened to what a chat template takes."""

from typing import Any

from llmserve.api.errors import invalid_type, invalid_value, missing, unsupported
from llmserve.errors import RequestError
from llmserve.frontend.chat_template import RESERVED

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}
_KEPT_STRINGS = ("name", "tool_call_id", "reasoning", "reasoning_content")
_RESERVED_KWARGS = RESERVED | {"tools", "documents", "self"}  # the template's own arguments


def read_messages(value: object) -> list[dict[str, Any]]:
    """Messages with string contents; text parts are joined by newlines. RequestError has a path."""
    if value is None:
        raise missing("messages")
    if not isinstance(value, list):
        raise invalid_type("messages", "an array of objects", value)
    if not value:
        raise invalid_value("messages", "it must not be empty", "array_below_min_length")
    return [_read(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read(message: object, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid_type(path, "an object", message)
    role = message.get("role")
    if role is None:
        raise missing(f"{path}.role")
    if not isinstance(role, str):
        raise invalid_type(f"{path}.role", "a string", role)
    if role not in ROLES:
        raise invalid_value(f"{path}.role", f"supported values are {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise unsupported(f"{path}.{name}")
    content = message.get("content")
    if content is None and role != "assistant":
        raise missing(f"{path}.content")
    kept: dict[str, Any] = {"role": role, "content": _content(content, f"{path}.content")}
    for name in _KEPT_STRINGS:
        extra = message.get(name)
        if extra is None:
            continue
        if not isinstance(extra, str):
            raise invalid_type(f"{path}.{name}", "a string", extra)
        kept[name] = extra
    return kept


def _content(content: object, path: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid_type(path, "a string or an array of parts", content)
    texts = []
    for index, part in enumerate(content):
        where = f"{path}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise invalid_type(where, "an object", part)
        kind = part.get("type")
        if kind is None:
            raise missing(f"{where}.type")
        if not isinstance(kind, str):
            raise invalid_type(f"{where}.type", "a string", kind)
        if kind not in _TEXT_PARTS:
            raise RequestError(
                f"Unsupported content part: '{kind[:64]}' at {where}; this server takes text only.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        text = part.get(_TEXT_PARTS[kind])
        if text is None:
            raise missing(f"{where}.{_TEXT_PARTS[kind]}")
        if not isinstance(text, str):
            raise invalid_type(f"{where}.{_TEXT_PARTS[kind]}", "a string", text)
        texts.append(text)
    return "\n".join(texts)


def check_template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Names that the template's own arguments have are refused, and so is all but small scalars."""
    for name, value in (kwargs or {}).items():
        path = f"chat_template_kwargs.{name[:64]}"
        if name in _RESERVED_KWARGS:
            raise unsupported(path)
        if not isinstance(value, bool | int | float | str | None):
            raise invalid_type(path, "a boolean, a number or a string", value)
        if isinstance(value, str) and len(value) > 1024:
            raise invalid_value(
                path, "it must be at most 1024 characters", "string_above_max_length"
            )
    return kwargs or {}
