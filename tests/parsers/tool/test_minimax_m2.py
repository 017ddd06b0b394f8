# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Invoke tags."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import PLAIN, TEXTS, Output, Parsed, loaded

MINIMAX = Output("minimax_m2", tools={"f": {"properties": {"i": {"type": "integer"}}}})
ENDS = ("</parameter>", "\n<parameter", "\n</invoke>", "\n<invoke", "\n</minimax:tool_call>")
SAYABLE = TEXTS.filter(lambda text: not any(end in text + "<" for end in ENDS))
ARGUMENTS = st.fixed_dictionaries({}, optional={"s": SAYABLE, "i": st.integers()})


def render(content: str, calls: list[dict[str, Any]], quote: str) -> str:
    """As the template does, with a choice of quotes."""
    text = content + ("\n" if content else "") + "<minimax:tool_call>\n"
    for arguments in calls:
        text += f"<invoke name={quote}f{quote}>\n"
        for key, value in arguments.items():
            text += f"<parameter name={quote}{key}{quote}>{value}</parameter>\n"
        text += "</invoke>\n"
    return text + "</minimax:tool_call>"


@given(PLAIN, st.lists(ARGUMENTS, min_size=1, max_size=2), st.sampled_from(["", "'", '"']))
def test_parse_undoes_render(content: str, calls: list[dict[str, Any]], quote: str) -> None:
    found = MINIMAX.check_law(render(content, calls, quote), every_cut=False)
    assert (found.content, loaded(found)) == (content, [("f", value) for value in calls])


def test_text_is_verbatim() -> None:
    text = '<invoke name="f"><parameter name="s">\n x \n</parameter></invoke>'
    assert MINIMAX.check_law(text) == Parsed(calls=[("f", '{"s": "\\n x \\n"}')])


@pytest.mark.parametrize("text", ["<minimax:tool_call>x", "<invoke>", "<invoke name='f>"])
def test_no_call_is_content(text: str) -> None:
    assert MINIMAX.check_law(text) == Parsed(text)
