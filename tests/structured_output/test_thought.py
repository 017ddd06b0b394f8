# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random
from typing import Any

import pytest

from llmserve.core.sampling_params import ReasoningBudget, SamplingParams
from llmserve.frontend.parsed_text import ParsedText, Parsing
from llmserve.frontend.thinking import make_budget
from llmserve.parsers.base import OutputParser
from llmserve.parsers.reasoning.openai_gptoss import HarmonyReasoning
from llmserve.parsers.reasoning.think import Mistral, Think
from llmserve.structured_output.thought import Thought
from tests.helpers.api import byte_tokenizer

TOKENIZER = byte_tokenizer()
[LETTER] = TOKENIZER.encode("a")


def _budget(tokens: int, reasoning: Any = Think, prompt: str = "", calls: bool = False) -> Any:
    openers = ("<tool_call>",) if calls else ()
    return make_budget(TOKENIZER, reasoning(prompt, False), openers, tokens)


def _write(budget: ReasoningBudget, text: str) -> str:
    """What comes of an output that wants to say `text`: forced tokens come in between."""
    thought = Thought(budget)
    wanted, written = TOKENIZER.encode(text), []
    while wanted or thought.forced is not None:
        spent = thought.may_be_spent(0)
        assert spent or thought.forced is None, "a forced token without a warning"
        token = wanted.pop(0) if thought.forced is None else thought.forced
        thought.feed(token)
        written.append(token)
    return TOKENIZER.decode(written)


@pytest.mark.parametrize(
    ("tokens", "prompt", "said", "written"),
    [
        (3, "<think>\n", "abcdef", "abc</think>def"),
        (0, "<think>\n", "abc", "</think>abc"),
        (9, "<think>\n", "abcdef", "abcdef"),
        (3, "", "abcdef<think>ghij", "abcdef<think>ghij"),
        (3, "", " \n<think>abcdef", " \n<think>abc</think>def"),
        (2, "", "<thin<think>abcdef", "<thin<think>abcdef"),
        (10, "<think>", "ab</think>cdefghijklmn", "ab</think>cdefghijklmn"),
        (9, "<think>", "ab<tool_call>cdef", "ab<tool_c</think>all>cdef"),
    ],
)
def test_the_end_is_forced(tokens: int, prompt: str, said: str, written: str) -> None:
    assert _write(_budget(tokens, prompt=prompt), said) == written


def test_the_opener_of_a_call_ends_reasoning() -> None:
    said = "ab<tool_call>cdefghijklmnopqrst"
    assert _write(_budget(15, prompt="<think>", calls=True), said) == said


def test_either_spelling_ends_it_and_the_first_is_forced() -> None:
    said = "ab</think>cdefghijklmnopqrst"
    assert _write(_budget(15, Mistral, "[THINK]"), said) == said
    assert _write(_budget(1, Mistral, "[THINK]"), "ab") == "a[/THINK]b"


def test_channels_reopen_and_are_sent_to_the_answer() -> None:
    analysis = "<|channel|>analysis<|message|>"
    end, final = "<|end|><|start|>assistant", "<|channel|>final<|message|>"
    said = f"{analysis}abcdef"
    assert _write(_budget(2, HarmonyReasoning), said) == f"{analysis}ab{end}{final}cdef"
    twice = f"{analysis}ab{analysis}cd"
    budget = _budget(2, HarmonyReasoning, calls=True)
    assert _write(budget, twice) == f"{analysis}ab{end}{analysis}{end}{final}cd"


def test_unseen_tokens_may_spend_the_rest() -> None:
    thought = Thought(_budget(3, prompt="<think>"))
    assert [thought.may_be_spent(n) for n in (0, 1, 2, 3)] == [False, False, False, True]
    thought.feed(LETTER)
    assert thought.may_be_spent(2)
    other = Thought(_budget(0))
    assert other.may_be_spent(0) and other.forced is None, "an opener may come"
    other.feed(LETTER)
    assert not other.may_be_spent(99), "it did not"


def test_a_parser_counts_no_more_than_the_budget() -> None:
    """On random outputs out of pieces that can be confused."""
    rng = random.Random(5)
    pieces = ["<think>", "</think>", "<", "/think>", "\n", " ", "é", "<tool_call>", "word", "</thi"]
    most = 0
    for _ in range(300):
        prompt = rng.choice(["", "<think>\n", "x"])
        tokens = rng.randrange(12)
        said = "".join(rng.choices(pieces, k=rng.randrange(1, 14)))
        budget = _budget(tokens, prompt=prompt)
        thought, text = Thought(budget), _parsed(prompt)
        wanted = TOKENIZER.encode(said)
        while wanted or thought.forced is not None:
            token = wanted.pop(0) if thought.forced is None else thought.forced
            thought.feed(token)
            text.feed([token])
        assert text.num_reasoning <= tokens + len(budget.endings[0]) - 1, (prompt, tokens, said)
        most = max(most, text.num_reasoning)
    assert most > 8


def _parsed(prompt: str) -> ParsedText:
    parsing = Parsing(lambda: OutputParser(Think(prompt, False), None), {})
    return ParsedText(TOKENIZER, SamplingParams(max_tokens=999), [], parsing)
