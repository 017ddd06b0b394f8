# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is said of grammars that no engine takes."""

import re
from typing import Any

import msgspec
import pytest

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.structured_output.compile_server import REFUSED, _compile
from llmserve.structured_output.normal_form import dump
from llmserve.structured_output.refusal import refusal
from tests.helpers.grammar import backend

TAG = "the structural tag is not accepted: "
GRAMMAR = "the grammar is not accepted: "
REGEX = "the regular expression '{}' is not accepted: {}"
CASES: list[tuple[str, Any, str, str]] = [
    ("guidance", "regex", "ab(c", REGEX.format("ab(c", "unclosed group, at position 3")),
    ("guidance", "regex", "é[", REGEX.format("é[", "unclosed character class, at position 2")),
    ("guidance", "regex", "a\n(", REGEX.format(r"a\n(", "unclosed group")),
    ("guidance", "regex", "(x{1000}){1000}", REGEX.format("(x{1000}){1000}", "it is too large")),
    ("guidance", "regex", r"\b", REGEX.format(r"\b", "lookarounds not supported yet")),
    ("guidance", "json", {"type": "array", "items": {"type": "string", "pattern": "x(["}},
     "the pattern 'x([' is not accepted: unclosed character class, at position 3"),
    ("xgrammar", "regex", "(a", REGEX.format("(a", "the parenthesis is not closed, at position 3")),
    ("xgrammar", "regex", "*a", REGEX.format("*a", "expect element, but got *")),
    ("xgrammar", "ebnf", "root ::= a",
     GRAMMAR + 'rule "a" is not defined, at line 1, column 10'),
    ("xgrammar", "ebnf", "root ::= ",
     GRAMMAR + "expect element, but got the end of it, at line 1, column 10"),
    ("guidance", "ebnf", 'root ::= ("a"', GRAMMAR + "expected ')', at line 1"),
    ("guidance", "ebnf", "root ::= root", GRAMMAR + "it allows no text"),
    ("guidance", "lark", 'start: "a', GRAMMAR + "it cannot be read, at line 1, column 10"),
    ("guidance", "lark", "start: /(/", GRAMMAR + "unclosed group, at line 1, column 8"),
    ("guidance", "lark", "start: x", GRAMMAR + 'unknown name: "x", at line 1, column 8'),
    ("xgrammar", "structural_tag", {"type": "nope"},
     TAG + "format type not recognized: nope"),
    ("xgrammar", "structural_tag", {"type": "regex", "pattern": "(a"},
     "the regular expression is not accepted: the parenthesis is not closed, at position 3"),
    ("xgrammar", "structural_tag", {"type": "tag", "begin": "<", "content": {"type": "any_text"}},
     TAG + "tag format must have an end field"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "kind", "text", "wanted"), CASES)
def test_a_refusal_is_one_sentence(engine: str, kind: Any, text: Any, wanted: str) -> None:
    if kind == "structural_tag":
        text = dump({"type": "structural_tag", "format": text})
    elif kind == "json":
        text = dump(text)
    spec = GrammarSpec(backend=engine, kind=kind, text=text)
    answer = _compile(backend(engine), msgspec.msgpack.encode(spec))
    assert answer == REFUSED + wanted.encode()


def test_nothing_of_the_library_is_left() -> None:
    spec = GrammarSpec(backend="xgrammar", kind="json", text="{}")
    said = "[20:57:44] /a/x.cc:90: Check failed: (a == -1) is false: Bounds are odd.\n  at 0x7f"
    assert refusal(spec, said) == "the schema is not accepted: bounds are odd"
    long = refusal(GrammarSpec(backend="guidance", kind="regex", text="(" * 999), "x" * 9_999)
    assert len(long) < 500 and re.search(r"'\({40}\.\.\.'", long)
