# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Values in tags: what a grammar lets be written is what a parser reads."""

import re
from typing import Any

import pytest

from llmserve.errors import GrammarError
from llmserve.structured_output import argument_styles
from llmserve.structured_output.base import CompiledGrammar
from tests.helpers.grammar import accepts, grammar

TAGS = {
    "qwen_xml": "<parameter=a>{}</parameter>",
    "minimax_xml": '<parameter name="a">{}</parameter>',
    "step3_xml": '<steptml:parameter name="a">{}</steptml:parameter>',
    "glm_xml": "<arg_key>a</arg_key><arg_value>{}</arg_value>",
    "deepseek_xml": '<｜DSML｜parameter name="a" string="true">{}</｜DSML｜parameter>',
    "kimi_k3_xml": '<|open|>argument key="a" type="string"<|sep|>{}<|close|>argument<|sep|>',
}


def _made(style: str, schema: dict[str, Any]) -> CompiledGrammar:
    whole = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    part = {"type": "json_schema", "json_schema": whole, "style": style}
    tag = {"type": "tag", "begin": "<f>", "content": part, "end": "</f>"}
    return grammar(structural_tag={"format": tag})


@pytest.mark.parametrize("style", TAGS)
def test_a_string_of_bounded_length_does_not_hold_its_end(style: str) -> None:
    end = TAGS[style].partition("{}")[2]

    def fits(text: str) -> bool:
        return accepts(made, f"<f>{TAGS[style].format(text)}</f>")

    made = _made(style, {"type": "string", "minLength": 2, "maxLength": 40})
    good = ["ab", "é\n", "<bc", "<b><", "a<b", "x" * 40, "x" * 38 + "</"]
    bad = ["", "a", "</", "x" * 41, f"{end}x", f"abc{end}x", f"a{end}"]
    assert [fits(text) for text in good + bad] == [True] * len(good) + [False] * len(bad)
    made = _made(style, {"type": "string", "minLength": 2})
    assert fits("<b" + "x" * 99) and not fits("a") and not fits(f"a{end}") and not fits(f"ab{end}x")
    made = _made(style, {"type": "string", "minLength": 3, "maxLength": 3})
    assert fits("abc") and not fits("ab") and not fits("abcd")


@pytest.mark.parametrize("style", TAGS)
def test_no_whitespace_stands_around_a_value_that_is_text(style: str) -> None:
    """But the newlines that a parser takes for none of it."""
    made = _made(style, {"enum": ["a", "b c"]})
    wanted = {"b c": True, " a": False, "a ": False, "\na\n": style == "qwen_xml", "\n\na": False}
    for text, fits in wanted.items():
        assert accepts(made, f"<f>{TAGS[style].format(text)}</f>") is fits


@pytest.mark.parametrize("required", [["a", "b"], []])
def test_tags_of_a_style_of_ours(required: list[str]) -> None:
    """Only they are named anew, not texts that look like them."""
    like = '<parameter name="x"> </parameter>'
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [like, "</parameter>", 1]}, "b": {"type": "string"}},
        "required": required,
    }
    part = {"type": "json_schema", "json_schema": schema, "style": "step3_xml"}
    made = grammar(structural_tag={"format": part})
    text = '<{0} name="a">{1}</{0}>\n<{0} name="b"> x\n</{0}>'
    for value, fits in (
        (like, True), ("</parameter>", True), ("1", True),
        (like.replace("p", "steptml:p"), False), ("</steptml:parameter>", False),
    ):  # fmt: skip
        assert accepts(made, text.format("steptml:parameter", value)) is fits
        assert not accepts(made, text.format("parameter", value))


@pytest.mark.parametrize("style", ["qwen_xml", "step3_xml"])
def test_a_grammar_written_in_another_way_is_refused(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken as it is, whose tags a parser would not read."""
    for pattern in ("_RAW",) + ("_OPENING",) * (style == "step3_xml"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(GrammarError, match="not known here"),
        ):
            patch.setattr(argument_styles, pattern, re.compile("never"))
            _made(style, {"type": "integer"})
