# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Objects whose only key is the name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.parsers import NAMES, OBJECTS, PLAIN, Output, Parsed

APERTUS = Output("apertus")
CALLS = st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3)


@given(PLAIN, CALLS)
def test_parse_undoes_render(content: str, calls: Any) -> None:
    array = ", ".join(json.dumps({name: arguments}) for name, arguments in calls)
    wanted = [(name, json.dumps(arguments)) for name, arguments in calls]
    text = f"{content}<|tools_prefix|>[{array}]<|tools_suffix|>"
    assert APERTUS.check_law(text, every_cut=False) == Parsed(content, "", wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('<|tools_prefix|>[{"f": {"a": 1}}', Parsed(calls=[("f", '{"a": 1}')])),
        ('a<|tools_prefix|>[{"f": {}}]<|tools_suffix|>b', Parsed("ab", "", [("f", "{}")])),
        ("<|tools_prefix|>[]<|tools_suffix|>", Parsed("<|tools_prefix|>[]<|tools_suffix|>")),
        ('<|tools_prefix|>[{"f": 1}]', Parsed('<|tools_prefix|>[{"f": 1}]')),
        ('<|tools_prefix|>[{"f": {"a": 1}}, 5]', Parsed(", 5]", "", [("f", '{"a": 1}')])),
    ],
)
def test_law(text: str, wanted: Parsed) -> None:
    assert APERTUS.check_law(text) == wanted
