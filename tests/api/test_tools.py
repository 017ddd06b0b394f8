# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tools and their choice, as clients write them."""

from typing import Any

import pytest

from llmserve.api.tools import NO_PARAMETERS, NO_TOOLS, read_tools
from llmserve.errors import RequestError


def tool(name: str = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def chosen(name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [chosen(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "mode", "named", "names"),
    [
        (None, "auto", None, None),
        ("auto", "auto", None, None),
        ("none", "none", None, None),
        ("required", "required", None, None),
        (chosen("g"), "required", "g", {"g"}),
        (allowed("auto", "g"), "auto", None, {"g"}),
        (allowed("required", "f", "g"), "required", None, {"f", "g"}),
    ],
)
def test_choices(choice: Any, mode: str, named: str | None, names: set[str] | None) -> None:
    tools = [tool(parameters={"type": "object"}), tool("g", description="d", parameters=None)]
    use = read_tools(tools, choice, True)
    assert (use.mode, use.named, use.allowed, use.active) == (mode, named, names, mode != "none")
    assert use.tools == tools and use.schemas == {"f": {"type": "object"}, "g": NO_PARAMETERS}


def test_no_tools() -> None:
    assert read_tools(None, None, True) is read_tools(None, "none", False) is NO_TOOLS
    assert not NO_TOOLS.active


@pytest.mark.parametrize(
    ("tools", "choice", "param", "code"),
    [
        (None, "auto", "tool_choice", "invalid_value"),
        (None, chosen(), "tool_choice", "invalid_value"),
        ({}, None, "tools", "invalid_type"),
        ([], None, "tools", "array_below_min_length"),
        ([tool(f"f{i}") for i in range(1025)], None, "tools", "array_above_max_length"),
        (["f"], None, "tools[0]", "invalid_type"),
        ([{}], None, "tools[0].type", "missing_required_parameter"),
        ([{"type": 1}], None, "tools[0].type", "invalid_type"),
        ([{"type": "custom"}], None, "tools[0].type", "unsupported_value"),
        ([{"type": "function"}], None, "tools[0].function", "missing_required_parameter"),
        ([{"type": "function", "function": 1}], None, "tools[0].function", "invalid_type"),
        ([tool(), tool(5)], None, "tools[1].function.name", "invalid_type"),
        ([tool("a b")], None, "tools[0].function.name", "invalid_value"),
        ([tool("x" * 65)], None, "tools[0].function.name", "invalid_value"),
        ([tool(), tool()], None, "tools[1].function.name", "invalid_value"),
        ([tool(parameters=[])], None, "tools[0].function.parameters", "invalid_type"),
        (
            [tool(), tool("g", parameters={"type": "array"})],
            None,
            "tools[1].function.parameters",
            "invalid_function_parameters",
        ),
        ([tool(strict="yes")], None, "tools[0].function.strict", "invalid_type"),
        ([tool(description=1)], None, "tools[0].function.description", "invalid_type"),
        ([tool()], "maybe", "tool_choice", "invalid_value"),
        ([tool()], 5, "tool_choice", "invalid_type"),
        ([tool()], {}, "tool_choice.type", "missing_required_parameter"),
        ([tool()], {"type": "custom"}, "tool_choice.type", "unsupported_value"),
        ([tool()], {"type": "function"}, "tool_choice.function", "missing_required_parameter"),
        ([tool()], chosen("g"), "tool_choice.function.name", "invalid_value"),
        (
            [tool()],
            {"type": "allowed_tools"},
            "tool_choice.allowed_tools",
            "missing_required_parameter",
        ),
        ([tool()], allowed("never", "f"), "tool_choice.allowed_tools.mode", "invalid_value"),
        ([tool()], allowed("auto"), "tool_choice.allowed_tools.tools", "array_below_min_length"),
        (
            [tool()],
            allowed("auto", "f", "g"),
            "tool_choice.allowed_tools.tools[1].function.name",
            "invalid_value",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_path(tools: Any, choice: Any, param: str, code: str) -> None:
    with pytest.raises(RequestError) as info:
        read_tools(tools, choice, True)
    assert (info.value.param, info.value.code) == (param, code)
