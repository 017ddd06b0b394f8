# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Calls as Python."""

import keyword
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, PLAIN, VALUES, Output, Parsed, loaded

PYTHONIC = Output("pythonic")
KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), min_size=1, max_size=3
)


def render(calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """As the model writes them."""
    return [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]


@given(CALLS, st.sampled_from([("", ""), ("<|python_start|>", "<|python_end|>")]))
def test_parse_undoes_render(calls: Any, markers: tuple[str, str]) -> None:
    text = f"[{', '.join(render(calls))}]".join(markers)
    found = PYTHONIC.check_law(text, every_cut=False)
    assert (found.content, loaded(found)) == ("", calls)


@given(PLAIN, CALLS)
def test_lfm2_and_olmo3_have_markers_of_their_own(content: str, calls: Any) -> None:
    text = f"{content}<|tool_call_start|>[{', '.join(render(calls))}]<|tool_call_end|>"
    found = Output("lfm2").check_law(text, every_cut=False)
    assert (found.content, loaded(found)) == (content, calls)
    lines = "\n".join(render(calls))
    found = Output("olmo3").check_law(
        f"<function_calls>\n{lines}\n</function_calls>", every_cut=False
    )
    assert (found.content, loaded(found)) == ("", calls)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("true", True), ("False", False), ("-1.5", -1.5), ("(1, 2)", [1, 2]),
        ("'it\\'s'", "it's"), ('"a" "b"', "ab"), ("{'k': [None]}", {"k": [None]}),
    ],
)  # fmt: skip
def test_literals(text: str, value: Any) -> None:
    assert loaded(PYTHONIC.check_law(f"[f({keyword.kwlist[5]}={text})]")) == [
        ("f", {keyword.kwlist[5]: value})
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2] is a list", "[f]", "[f(1)]", "[f(a=b)]", "[f(a=007)]", "[f(a=g())]", "[f(a=1e999)]",
        "[f(a=__import__('os'))]", "[f(a={1: 2})]", "[f(a=[1)]", "[f(a='x", "[f(", "[", "f(a=1)",
        "[f(a=" + "[" * 70 + "]" * 70 + ")]", "[f(a=1j)]", "[f(a=b'x')]", "[f(**{})]",
    ],
)  # fmt: skip
def test_what_is_no_call_is_content(text: str) -> None:
    assert PYTHONIC.check_law(text) == Parsed(text)
