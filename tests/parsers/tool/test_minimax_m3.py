# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Elements before whose tags the name space stands."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import PLAIN, TEXTS, Output, Parsed, loaded

NS = "]<]minimax[>["
ITEM = {"type": "object", "properties": {"sku": {"type": "string"}, "n": {"type": "integer"}}}
SCHEMA = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "b": {"type": ["boolean", "null"]},
        "l": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "o": {"type": "object", "properties": {"deep": ITEM, "s": {"type": "string"}}},
        "m": {"type": "array", "items": ITEM},
    },
}
M3 = Output("minimax_m3", "minimax_m3", tools={"f": SCHEMA})
SAYABLE = TEXTS.filter(lambda text: NS not in text + NS[:-1])
ITEMS = st.fixed_dictionaries({"sku": SAYABLE}, optional={"n": st.integers()})
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "s": SAYABLE,
        "i": st.integers(),
        "b": st.booleans() | st.none(),
        "l": st.lists(st.lists(st.integers(), max_size=2), max_size=3),
        "o": st.fixed_dictionaries({}, optional={"deep": ITEMS, "s": SAYABLE}),
        "m": st.lists(ITEMS, max_size=2),
    },
)


def element(name: str, value: Any) -> str:
    match value:
        case dict():
            body = "".join(element(key, part) for key, part in value.items())
        case list():
            body = "".join(element("item", part) for part in value)
        case bool():
            body = str(value).lower()
        case None:
            body = "null"
        case _:
            body = str(value)
    return f"{NS}<{name}>{body}{NS}</{name}>"


def render(content: str, calls: list[dict[str, Any]]) -> str:
    """As the template does."""
    text = f"{content}{NS}<tool_call>\n"
    for arguments in calls:
        body = "".join(element(key, value) for key, value in arguments.items())
        text += f'{NS}<invoke name="f">{body}{NS}</invoke>\n'
    return f"{text}{NS}</tool_call>"


@given(PLAIN, st.lists(ARGUMENTS, min_size=1, max_size=2))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]]) -> None:
    found = M3.check_law(f"<mm:think>so</mm:think>{render(content, calls)}", every_cut=False)
    assert found[:2] == (content, "so")
    assert loaded(found) == [("f", value) for value in calls]


def test_at_every_cut() -> None:
    value = {"s": "a<b>]<", "i": 1, "m": [{"sku": "x", "n": 2}], "o": {"s": ""}}
    found = M3.check_law(render("hi", [value, {}]))
    assert (found.content, loaded(found)) == ("hi", [("f", value), ("f", {})])


def test_without_a_schema() -> None:
    value = {"a": ["1", "x"], "o": {"b": "null"}, "i": "5"}
    text = render("", [value])
    assert loaded(Output("minimax_m3", tools={}).check_law(text)) == [("f", value)]


def test_what_is_not_closed() -> None:
    text = f'{NS}<invoke name="f">{NS}<o>{NS}<s>x{NS}</i>y'
    assert loaded(M3.check_law(text)) == [("f", {"o": {"s": "x</i>y"}})]
    assert M3.parse(text, complete=False) == Parsed(text)


@pytest.mark.parametrize(
    "text", [f"{NS}<tool_call>", f"{NS}<tool_call>x", f"{NS}<invoke>", f"{NS}<invoke name='f>"]
)
def test_no_call_is_content(text: str) -> None:
    assert M3.check_law(text) == Parsed(text)


def test_too_deep_is_content() -> None:
    text = f'{NS}<invoke name="f">' + f"{NS}<a>" * 70 + f"{NS}</invoke>"
    assert M3.check_law(text, every_cut=False) == Parsed(text)


def test_reasoning_that_is_skipped() -> None:
    assert M3.check_law("</mm:think>\nhello") == Parsed("hello")
    assert M3.check_law("hello</mm:think>") == Parsed("hello</mm:think>")
