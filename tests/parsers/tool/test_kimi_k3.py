# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Blocks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, TEXTS, VALUES, Output, Parsed, loaded

OPEN, CLOSE, SEP = "<|open|>", "<|close|>", "<|sep|>"
THINKS = Output("kimi_k3", "kimi_k3", prompt=f"x{OPEN}think{SEP}")
ANSWERS = Output("kimi_k3", "kimi_k3", prompt=f"x{OPEN}response{SEP}")
SAYABLE = TEXTS.filter(lambda text: OPEN not in text and CLOSE not in text)
ARGUMENTS = st.dictionaries(
    st.text(st.sampled_from("ab &\"';é"), min_size=1, max_size=4).filter(lambda k: k == k.strip()),
    SAYABLE | VALUES.filter(lambda v: not isinstance(v, str) and OPEN not in json.dumps(v)
                            and CLOSE not in json.dumps(v)),
    max_size=3,
)  # fmt: skip
TYPES = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}


def block(name: str, body: str, **attributes: str) -> str:
    """Attributes are escaped, bodies are not."""
    shown = "".join(
        f' {key}="{value.replace("&", "&amp;").replace(chr(34), "&quot;")}"'
        for key, value in attributes.items()
    )
    return f"{OPEN}{name}{shown}{SEP}{body}{CLOSE}{name}{SEP}"


def argument(key: str, value: Any) -> str:
    kind = "string" if isinstance(value, str) else TYPES.get(type(value), "null")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return block("argument", text, key=key, type=kind)


def render(content: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What follows a prompt that has opened the answer."""
    text = f"{content}{CLOSE}response{SEP}"
    if calls:
        text += block(
            "tools",
            "".join(
                block("call", "".join(argument(*pair) for pair in value.items()), tool=name,
                      index=str(index))
                for index, (name, value) in enumerate(calls, 1)
            ),
        )  # fmt: skip
    return f"{text}{CLOSE}message{SEP}<|end_of_msg|>"


@given(PLAIN, st.lists(st.tuples(NAMES, ARGUMENTS), max_size=2))
def test_parse_undoes_render(content: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    found = ANSWERS.check_law(render(content, calls), every_cut=False)
    assert (found.content, found.reasoning, loaded(found)) == (content, "", calls)


@given(PLAIN, PLAIN, st.lists(st.tuples(NAMES, OBJECTS.map(lambda o: {"o": len(o)})), max_size=1))
def test_behind_reasoning(thought: str, content: str, calls: list[tuple[str, Any]]) -> None:
    text = f"{thought}{CLOSE}think{SEP}{OPEN}response{SEP}{render(content, calls)}"
    found = THINKS.check_law(text, every_cut=False)
    assert (found.content, found.reasoning, loaded(found)) == (content, thought, calls)


def test_at_every_cut() -> None:
    value = {"s": "12", "a&b": {"x": [1, None]}, "e": ""}
    text = f"so{CLOSE}think{SEP}{OPEN}response{SEP}" + render("hi", [("f", value), ("g", {})])
    found = THINKS.check_law(text)
    assert (found.content, found.reasoning) == ("hi", "so")
    assert loaded(found) == [("f", value), ("g", {})]


def test_what_is_not_closed() -> None:
    text = f'{OPEN}tools{SEP}{OPEN}call tool="f" index="1"{SEP}{OPEN}argument key="s" type="string"'
    cut = text + f"{SEP}ab"
    assert ANSWERS.parse(cut, complete=False).calls == [("f", '{"s": "ab')]
    assert ANSWERS.check_law(cut).calls == [("f", '{"s": "ab"}')]


@pytest.mark.parametrize(
    "text", ["", "x", f"{OPEN}call", f'{OPEN}call tool="f"', f"{OPEN}call{SEP}"]
)
def test_no_call_is_content(text: str) -> None:
    text = f"{OPEN}tools{SEP}{text}"
    assert ANSWERS.check_law(text) == Parsed(text)
