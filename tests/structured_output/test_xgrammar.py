# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every kind of grammar, by either engine, over a vocabulary of bytes."""

from typing import Any

import numpy as np
import pytest

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.structured_output import xgrammar
from llmserve.structured_output.normal_form import dump
from llmserve.structured_output.vocabulary import Vocabulary
from llmserve.structured_output.xgrammar import XGrammarBackend
from tests.helpers.grammar import EOS, WORDS, accepts, allowed, backend, compiled, grammar

TAG = {
    "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f>"],
}
KINDS: list[tuple[dict[str, Any], str, str]] = [
    ({"json": {"type": "integer"}}, "17", "x"),
    ({"json": '{"type": "integer"}'}, "17", "x"),
    ({"json_object": True}, '{"a": [1, {"b": null}]}', "[]"),
    ({"regex": r"[a-c]{2}\d"}, "ab7", "ab"),
    ({"choice": ["yes", 'no "q"\n', "nö"]}, 'no "q"\n', "ye"),
    ({"grammar": 'root ::= "a" b\nb ::= [0-9]+'}, "a12", "a"),
    ({"grammar": 'start: "a" B\nB: /[0-9]+/'}, "a12", "a"),
    ({"structural_tag": TAG}, "free <f>12</f> text", "<f>x</f>"),
    (
        {"structural_tag": {"format": {"type": "const_string", "value": "abc"}}},
        "abc", "ab",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "good", "bad"), KINDS)
@pytest.mark.parametrize("engine", ["auto", "xgrammar", "guidance"])
def test_kind(fields: dict[str, Any], good: str, bad: str, engine: str) -> None:
    if "structural_tag" in fields and engine == "guidance":
        return  # refused: test_prepare
    made = grammar(engine, **fields)
    assert accepts(made, good)
    assert not accepts(made, bad)


@pytest.mark.parametrize("engine", ["xgrammar", "guidance"])
def test_a_text_ends_only_where_it_may(engine: str) -> None:
    matcher = grammar(engine, regex="ab?").start()
    words = np.zeros(WORDS, np.int32)
    matcher.fill(words)
    assert allowed(words) == [ord("a")]
    assert matcher.accept(ord("a")) and not matcher.ended()
    matcher.fill(words)
    assert allowed(words) == [ord("b"), EOS]
    assert matcher.accept(EOS) and matcher.ended()


@pytest.mark.parametrize("engine", ["xgrammar", "guidance"])
def test_a_token_against_the_grammar_is_not_taken(engine: str) -> None:
    assert not grammar(engine, regex="ab").start().accept(ord("x"))


@pytest.mark.parametrize("engine", ["xgrammar", "guidance"])
def test_requests_do_not_share_their_place(engine: str) -> None:
    made = grammar(engine, regex="ab")
    first, second = made.start(), made.start()
    assert first.accept(ord("a")) and second.accept(ord("a")) and first.accept(ord("b"))
    words = np.zeros(WORDS, np.int32)
    second.fill(words)
    assert allowed(words) == [ord("b")]


@pytest.mark.parametrize(
    ("kind", "text"), [("regex", "(a"), ("ebnf", 'root ::= "a'), ("json", '{"type": "x"}')]
)
@pytest.mark.parametrize("engine", ["xgrammar", "guidance"])
def test_nonsense_is_an_error(engine: str, kind: Any, text: str) -> None:
    with pytest.raises(Exception, match=r"."):
        compiled(GrammarSpec(backend=engine, kind=kind, text=text))
    assert backend(engine).vocabulary.tokens[97] == b"a"  # and the engine is as before


def test_a_structural_tag_may_have_its_markers_written_as_tokens() -> None:
    """And no grammar any other special token."""
    tokens = [*(bytes([i]) for i in range(256)), b"", b"", b""]
    vocabulary = Vocabulary(tokens, [256], {257: b"</think>", 258: b"<|call|>"})
    made = XGrammarBackend(vocabulary)
    tag = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"}
    text = dump({"type": "structural_tag", "format": tag})
    spec = GrammarSpec(backend="xgrammar", kind="structural_tag", text=text)
    grammar = XGrammarBackend(vocabulary).load(spec, made.compile(spec))
    words = np.zeros(WORDS, np.int32)
    matcher = grammar.start()
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert (bits[257], bits[258]) == (1, 0)
    assert matcher.accept(ord("x")) and matcher.accept(257)
    assert matcher.ended() or matcher.accept(256)
    plain = GrammarSpec(backend="xgrammar", kind="ebnf", text='root ::= "</think>"')
    matcher = made.load(plain, made.compile(plain)).start()
    matcher.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits[: len(tokens)]).tolist() == [ord("<")]


@pytest.mark.parametrize(("engine", "many"), [("xgrammar", 21), ("xgrammar", 20), ("guidance", 0)])
def test_masks_of_many_are_those_of_each(
    engine: str, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one thread, and from `many` on in two."""
    monkeypatch.setattr(xgrammar, "_THREADS", 2)
    monkeypatch.setattr(xgrammar, "_MANY", many)
    made = [
        grammar(engine, **fields).start()
        for fields in ({"json": {"type": "array"}}, {"choice": ["yes", "no"]})
        for _ in range(10)
    ]
    for i, matcher in enumerate(made):
        assert matcher.accept(ord("[ny"[i // 10 + (i > 14)]))
    together, alone = np.full((22, WORDS), 7, np.int32), np.full((22, WORDS), 7, np.int32)
    rows = [int(row) for row in np.random.default_rng().permutation(22)[:20]]
    type(made[0]).fill_all(made, together, rows)
    for row, matcher in zip(rows, made, strict=True):
        matcher.fill(alone[row])
    assert (together == alone).all() and len({bytes(words) for words in together}) == 4
