# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What only llguidance does. The rest: test_xgrammar.py and test_schema.py."""

import numpy as np
import pytest

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import GrammarError
from llmserve.structured_output.guidance import GuidanceBackend
from llmserve.structured_output.vocabulary import Vocabulary
from tests.helpers.grammar import accepts, compiled, grammar


def test_forced_text_is_not_skipped() -> None:
    """Its parser runs ahead over text that leaves no choice; the mask must not."""
    tokens = [b"{", b'{"', b"n", b"na", b"name", b'"', b":", b"1", b"}", b""]
    made = GuidanceBackend(Vocabulary(tokens, [9]))
    schema = '{"type":"object","properties":{"name":{"type":"integer"}},"required":["name"]}'
    spec = GrammarSpec(backend="guidance", kind="json", text=schema)
    matcher = made.load(spec, b"").start()
    words = np.zeros(1, np.int32)
    matcher.fill(words)
    assert words[0] & 0x3FF in (0b1, 0b10, 0b11)  # "{" first, whatever follows


def test_look_around_is_refused() -> None:
    for pattern in (r"a(?=b)", r"(a)\1", r"\bfoo"):
        with pytest.raises(GrammarError):
            grammar("guidance", regex=pattern)


def test_a_closed_schema_has_every_end_token() -> None:
    made = GuidanceBackend(Vocabulary([b"a", b"", b""], [1, 2]))
    matcher = made.load(GrammarSpec(backend="guidance", kind="regex", text="a"), b"").start()
    words = np.zeros(1, np.int32)
    assert matcher.accept(0)
    matcher.fill(words)
    assert words[0] & 7 == 0b110 and matcher.ended()


def test_ebnf_is_translated() -> None:
    made = compiled(GrammarSpec(backend="guidance", kind="ebnf", text='root ::= "x" [0-9]+'))
    assert accepts(made, "x12") and not accepts(made, "x")


def test_a_parser_that_gives_up_says_so() -> None:
    """It has limits of its own, which it comes to only when a token is taken."""
    made = GuidanceBackend(Vocabulary([b"x", b"y", b""], [2]))
    spec = GrammarSpec(backend="guidance", kind="regex", text="y(x{1000}){1000}")
    with pytest.raises(GrammarError, match="limit|fuel|too"):
        matcher = made.load(spec, b"").start()
        words = np.zeros(1, np.int32)
        for token in (1, 0, 0):
            matcher.fill(words)
            matcher.accept(token)
