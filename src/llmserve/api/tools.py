# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`tools`, `tool_choice` and `parallel_tool_calls` of a chat request."""

import re
from typing import Any, Literal, NamedTuple

from llmserve.api.errors import clip, invalid_choice, invalid_type, invalid_value, missing
from llmserve.errors import RequestError

MAX_TOOLS = 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ToolUse(NamedTuple):
    """What a request says about tools.

    `tools` go into the template as they came; `schemas` are their parameters by name. Of them,
    `allowed` may be called. With mode "required" one of them must be; the `named` one just once.
    """

    tools: list[dict[str, Any]]
    schemas: dict[str, dict[str, Any]]
    mode: Literal["none", "auto", "required"]
    named: str | None = None
    allowed: frozenset[str] | None = None
    strict: frozenset[str] = frozenset()
    parallel: bool = True

    @property
    def active(self) -> bool:
        """Whether calls are looked for."""
        return bool(self.tools) and self.mode != "none"


NO_TOOLS = ToolUse([], {}, "none")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def read_tools(tools: object, choice: object, parallel: bool) -> ToolUse:
    """The three fields together; RequestError has a path into them."""
    if tools is None:
        if choice is not None and choice != "none":
            raise invalid_value("tool_choice", "it is only allowed with tools")
        return NO_TOOLS
    if not isinstance(tools, list):
        raise invalid_type("tools", "an array of objects", tools)
    if not 1 <= len(tools) <= MAX_TOOLS:
        side = "above_max" if tools else "below_min"
        raise invalid_value(
            "tools",
            f"it must have 1 to {MAX_TOOLS} tools, got {len(tools)}",
            f"array_{side}_length",
        )
    schemas: dict[str, dict[str, Any]] = {}
    strict: set[str] = set()
    for index, tool in enumerate(tools):
        function = _function(tool, f"tools[{index}]")
        name = function["name"]
        if name in schemas:
            raise invalid_value(f"tools[{index}].function.name", f"'{name}' is there twice")
        schemas[name] = function.get("parameters") or NO_PARAMETERS
        if function.get("strict"):
            strict.add(name)
    use = ToolUse(tools, schemas, "auto", strict=frozenset(strict), parallel=parallel)
    return _with_choice(use, choice)


def _function(tool: object, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise invalid_type(path, "an object", tool)
    _check_type(tool, path)
    path = f"{path}.function"
    function = tool.get("function")
    if function is None:
        raise missing(path)
    if not isinstance(function, dict):
        raise invalid_type(path, "an object", function)
    _check_name(function.get("name"), f"{path}.name")
    kinds: list[tuple[str, type, str]] = [
        ("description", str, "a string"),
        ("parameters", dict, "an object"),
        ("strict", bool, "a boolean"),
    ]
    for name, kind, words in kinds:
        value = function.get(name)
        if value is not None and not isinstance(value, kind):
            raise invalid_type(f"{path}.{name}", words, value)
    kinds_of = (function.get("parameters") or {}).get("type") or "object"
    if "object" not in (kinds_of if isinstance(kinds_of, list) else [kinds_of]):
        raise invalid_value(
            f"{path}.parameters",
            f"its type must be object, got '{clip(str(kinds_of))}'",
            "invalid_function_parameters",
        )
    return function


def _check_type(value: dict[str, Any], path: str) -> None:
    kind = value.get("type")
    if kind is None:
        raise missing(f"{path}.type")
    if not isinstance(kind, str):
        raise invalid_type(f"{path}.type", "a string", kind)
    if kind != "function":
        raise RequestError(
            f"Unsupported value for '{path}.type': this server knows tools of type function only.",
            param=f"{path}.type",
            code="unsupported_value",
        )


def _check_name(name: object, path: str) -> None:
    if name is None:
        raise missing(path)
    if not isinstance(name, str):
        raise invalid_type(path, "a string", name)
    if not _NAME.fullmatch(name):
        raise invalid_value(path, f"it must be 1 to 64 of A-Z a-z 0-9 _ -, got '{clip(name)}'")


def _with_choice(use: ToolUse, choice: object) -> ToolUse:
    path = "tool_choice"
    match choice:
        case None:
            return use
        case "none" | "auto" | "required" as mode:
            return use._replace(mode=mode)
        case str():
            raise invalid_choice(path, choice, ["none", "auto", "required"])
        case dict():
            if choice.get("type") == "allowed_tools":
                return _with_allowed(use, choice)
            _check_type(choice, path)
            name = _chosen(choice, path, use)
            return use._replace(
                mode="required", named=name, allowed=frozenset([name]), parallel=False
            )
    raise invalid_type(path, "a string or an object", choice)


def _with_allowed(use: ToolUse, choice: dict[str, Any]) -> ToolUse:
    path = "tool_choice.allowed_tools"
    body = choice.get("allowed_tools")
    if body is None:
        raise missing(path)
    if not isinstance(body, dict):
        raise invalid_type(path, "an object", body)
    mode, tools = body.get("mode"), body.get("tools")
    if mode not in ("auto", "required"):
        raise invalid_choice(f"{path}.mode", mode, ["auto", "required"])
    if not isinstance(tools, list):
        raise invalid_type(f"{path}.tools", "an array of objects", tools)
    if not tools:
        raise invalid_value(f"{path}.tools", "it must not be empty", "array_below_min_length")
    names = set()
    for index, tool in enumerate(tools):
        where = f"{path}.tools[{index}]"
        if not isinstance(tool, dict):
            raise invalid_type(where, "an object", tool)
        _check_type(tool, where)
        names.add(_chosen(tool, where, use))
    return use._replace(mode=mode, allowed=frozenset(names))


def _chosen(choice: dict[str, Any], path: str, use: ToolUse) -> str:
    function = choice.get("function")
    if function is None:
        raise missing(f"{path}.function")
    if not isinstance(function, dict):
        raise invalid_type(f"{path}.function", "an object", function)
    name = function.get("name")
    _check_name(name, f"{path}.function.name")
    if name not in use.schemas:
        raise invalid_value(f"{path}.function.name", f"there is no tool '{name}' in tools")
    return str(name)
