# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random

from tokenizers import AddedToken

from llmserve.frontend.thinking import make_budget
from llmserve.frontend.tokenizer import Tokenizer
from llmserve.parsers.reasoning.think import Think
from tests.helpers.api import byte_tokenizer
from tests.helpers.frontend import byte_level

TOKENIZER = byte_tokenizer()


def test_a_budget_in_the_engines_words() -> None:
    budget = make_budget(TOKENIZER, Think("<think>\n", False), ("<tool_call>",), 7)
    assert (budget.tokens, budget.inside, budget.reopens) == (7, True, False)
    assert budget.opens == [b"<think>"]
    assert budget.closes == [b"</think>", b"<tool_call>"]
    assert [TOKENIZER.decode(ending) for ending in budget.endings] == ["</think>"]
    assert not make_budget(TOKENIZER, Think("hm", False), (), 7).inside


def test_pieces_are_enough_to_find_a_marker() -> None:
    """However a text is cut into tokens: those that are left out interrupt every marker."""
    tokenizer = byte_level()
    budget = make_budget(tokenizer, Think("", False), (), 7)
    rng = random.Random(3)
    assert 0 < len(budget.pieces) < tokenizer.vocab_size / 2
    found = 0
    for _ in range(200):
        text = "".join(rng.choices(["</think>", "</", "think>", "<", "a", " the", "\n"], k=6))
        tail = b""
        seen = False
        for token in tokenizer.encode(text, add_special_tokens=False):
            piece = budget.pieces.get(token)
            assert piece in (None, tokenizer.token_bytes(token))
            tail = b"" if piece is None else tail + piece
            seen |= b"</think>" in tail
        assert seen == ("</think>" in text), text
        found += seen
    assert 50 < found < 200


def test_a_marker_that_is_a_token_is_forced_as_one() -> None:
    plain = byte_tokenizer()
    plain._backend.add_special_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer = Tokenizer(plain._backend, plain.special_tokens)
    budget = make_budget(tokenizer, Think("<think>", False), (), 7)
    closer = tokenizer.token_id("</think>")
    assert budget.endings == [[closer]]
    assert budget.pieces[closer or 0] == b"</think>"
