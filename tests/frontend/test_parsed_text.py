# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tokens through a parser: special tokens, stop strings, and counts."""

from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.parsed_text import ParsedText, Parsing, shown_tokens
from llmserve.frontend.tokenizer import Tokenizer
from llmserve.parsers.registry import choose_parsers
from tests.helpers.parsers import Parsed, join

PARSERS = choose_parsers("", "", "hermes", "qwen3")
SPECIAL = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<pad>"]


def special_tokenizer() -> Tokenizer:
    """One token a byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name) for name in SPECIAL])
    return Tokenizer(backend, {})


TOKENIZER = special_tokenizer()
CALL = '<tool_call>{"name": "f", "arguments": {"a": "é end"}}</tool_call>'


def parsed(
    text: str, step: int = 1, complete: bool = True, **params: Any
) -> tuple[ParsedText, Parsed]:
    parsing = Parsing(lambda: PARSERS.make({}, "", False), shown_tokens(TOKENIZER, PARSERS.markers))
    output = ParsedText(TOKENIZER, SamplingParams(**params), [], parsing)
    ids, parts = TOKENIZER.encode(text, add_special_tokens=False), []
    for at in range(0, len(ids), step):
        some = ids[at : at + step]
        used = output.feed(some)
        parts += output.take()
        if output.stop_reason is not None:
            assert used <= len(some)
            return output, join(parts)
    output.finish(complete)
    return output, join(parts + output.take())


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_markers_that_are_special_tokens_reach_the_parser_and_others_nobody(step: int) -> None:
    output, found = parsed(f"<think>\nhm<pad>\n</think>\n\nok<pad>{CALL}", step)
    assert found == Parsed("ok", "hm", [("f", '{"a": "é end"}')])


def test_tokens_are_counted_by_state() -> None:
    output, _ = parsed("<think>abc</think>de")
    assert output.hidden == [True] * 5 + [False] * 2
    assert output.num_reasoning == 3


@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize(
    ("text", "stop", "content", "reason"),
    [
        ("<think>end</think>so end of it", ["end"], "so ", "end"),
        (f"a{CALL}b end", ["end"], "ab ", "end"),
        (f"en{CALL}d", ["end"], "end", None),  # what is left of a call is no part of it
        ("abcd", ["bc", "abc"], "", "abc"),
        ("abc", ["cd"], "abc", None),
        ("<think>a</think>b", ["</think>", "<tool"], "b", None),
    ],
)
def test_stop_strings_are_found_in_content_alone(
    text: str, stop: list[str], content: str, reason: str | None, step: int
) -> None:
    output, found = parsed(text, step, stop=stop)
    assert (found.content, output.stop_reason) == (content, reason)


def test_a_stop_string_may_be_kept_and_may_come_too_early() -> None:
    assert parsed("a end", stop=["end"], include_stop_str_in_output=True)[1].content == "a end"
    output, found = parsed("a end b end", stop=["end"], min_tokens=8)
    assert (found.content, output.stop_reason) == ("a end b ", "end")


def test_content_streams_up_to_what_may_be_a_stop_string() -> None:
    parsing = Parsing(lambda: PARSERS.make(None, "", False), {})
    output = ParsedText(TOKENIZER, SamplingParams(stop=["end"]), [], parsing)
    output.feed(TOKENIZER.encode("abcd", add_special_tokens=False))
    assert [part.text for part in output.take()] == ["ab"]


def test_an_output_that_is_cut_leaves_its_call_cut() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1'
    assert parsed(text, complete=False)[1].calls == [("f", '{"a": 1')]
