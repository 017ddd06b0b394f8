# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat messages of a body, checked and flattened to what a chat template takes."""

import hashlib
from typing import Any

from llmserve.api.errors import invalid_choice, invalid_type, invalid_value, missing, unsupported
from llmserve.errors import RequestError
from llmserve.frontend.chat_template import RESERVED
from llmserve.parsers.json_text import loads
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

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
    if role not in ROLES:
        raise invalid_choice(f"{path}.role", role, ROLES)
    for name in ("function_call", "audio"):
        if message.get(name):
            raise unsupported(f"{path}.{name}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("refusal") is not None:
        content = [{"type": "refusal", "refusal": message["refusal"]}]
    if content is None and role != "assistant":
        raise missing(f"{path}.content")
    thoughts: list[str] | None = [] if role == "assistant" else None
    text = _content(content, f"{path}.content", thoughts)
    kept: dict[str, Any] = {"role": role, "content": text}
    for name in _KEPT_STRINGS:
        extra = message.get(name)
        if extra is None:
            continue
        if not isinstance(extra, str):
            raise invalid_type(f"{path}.{name}", "a string", extra)
        kept[name] = extra
    if role == "assistant":
        calls = message.get("tool_calls")
        if calls is not None and (read := _calls(calls, f"{path}.tool_calls")):
            kept["tool_calls"] = read
        thought = kept.get("reasoning", kept.get("reasoning_content"))
        if thought is None and thoughts:
            thought = "\n".join(thoughts)
        if thought is not None:  # templates read either name
            kept["reasoning"] = kept["reasoning_content"] = thought
    return kept


def _calls(calls: object, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise invalid_type(path, "an array of objects", calls)
    return [_call(call, f"{path}[{index}]") for index, call in enumerate(calls)]


def _call(call: object, path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise invalid_type(path, "an object", call)
    if (kind := call.get("type")) not in (None, "function"):
        raise invalid_choice(f"{path}.type", kind, ["function"])
    function = call.get("function")
    if function is None:
        raise missing(f"{path}.function")
    if not isinstance(function, dict):
        raise invalid_type(f"{path}.function", "an object", function)
    name, id = function.get("name"), call.get("id")
    if name is None:
        raise missing(f"{path}.function.name")
    if not isinstance(name, str):
        raise invalid_type(f"{path}.function.name", "a string", name)
    if not isinstance(id, str | None):
        raise invalid_type(f"{path}.id", "a string", id)
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments")
    return {"id": id or "", "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: object, path: str) -> dict[str, Any]:
    """What a call was made with, as templates take it. An agent whose model once wrote broken
    arguments sends them back for ever, so they are no error."""
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise invalid_type(path, "a string", value)
    found = loads(value)
    if not isinstance(found, dict):
        logger.warning("%s is no JSON object: the template gets an empty one", path)
        return {}
    return found


def with_short_ids(messages: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The messages with all ids of calls as `length` letters and digits, equal ones alike."""
    return [_with_short_ids(message, length) for message in messages]


def _with_short_ids(message: dict[str, Any], length: int) -> dict[str, Any]:
    if calls := message.get("tool_calls"):
        calls = [call | {"id": _short_id(call["id"], length)} for call in calls]
        message = message | {"tool_calls": calls}
    if id := message.get("tool_call_id"):
        message = message | {"tool_call_id": _short_id(id, length)}
    return message


def _short_id(id: str, length: int) -> str:
    if len(id) == length and id.isascii() and id.isalnum():
        return id
    return hashlib.sha256(id.encode()).hexdigest()[:length]


def _content(content: object, path: str, thoughts: list[str] | None) -> str:
    """The text; parts of reasoning go to `thoughts`, where there may be some."""
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
        name = _TEXT_PARTS.get(kind)
        if kind == "thinking" and thoughts is not None:
            name = kind
        if name is None:
            raise RequestError(
                f"Unsupported content part: '{kind[:64]}' at {where}; this server takes text only.",
                param=f"{where}.type",
                code="unsupported_parameter",
            )
        text = part.get(name)
        if text is None:
            raise missing(f"{where}.{name}")
        if not isinstance(text, str):
            raise invalid_type(f"{where}.{name}", "a string", text)
        if kind == "thinking" and thoughts is not None:
            thoughts.append(text)
        else:
            texts.append(text)
    return "\n".join(texts)


def check_template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Names that the template's own arguments have are refused."""
    for name in kwargs or {}:
        if name in _RESERVED_KWARGS:
            raise unsupported(f"chat_template_kwargs.{name}")
    return kwargs or {}
