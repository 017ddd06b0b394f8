# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Text from tokens, against decoding the whole at once and against brute force."""

import itertools
import random
from pathlib import Path

import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.detokenizer import OutputText, TableDetokenizer, make_detokenizer
from llmserve.frontend.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.frontend import byte_level, word_piece, write_sentencepiece

BYTES = byte_level()
MIXED = "naïve café 日本語 한국어 😀👍🏽 the cat"


def chunks(rng: random.Random, ids: list[int]) -> list[list[int]]:
    """`ids` cut at random places, as steps that piled up deliver them."""
    result, at = [], 0
    while at < len(ids):
        size = rng.randint(1, 4)
        result.append(ids[at : at + size])
        at += size
    return result


def streamed(tokenizer: Tokenizer, parts: list[list[int]], skip: bool = True) -> str:
    detokenizer = make_detokenizer(tokenizer, skip, [])
    return "".join(map(detokenizer.feed, parts)) + detokenizer.flush()


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_give_the_text_of_a_whole_decode(skip: bool) -> None:
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(BYTES.vocab_size) for _ in range(rng.randint(0, 40))]
        assert streamed(BYTES, chunks(rng, ids), skip) == BYTES.decode(ids, skip)


def test_no_split_of_a_character_shows_before_it_is_whole() -> None:
    ids = [BYTES.token_id(c) for c in byte_tokens(MIXED)]
    detokenizer = TableDetokenizer(BYTES, True)
    seen = ""
    for token in ids:
        seen += detokenizer.feed([token])  # type: ignore[list-item]
        assert "\ufffd" not in seen and MIXED.startswith(seen)
    assert seen + detokenizer.flush() == MIXED


def byte_tokens(text: str) -> list[str]:
    """The byte-level stand-ins for the text's bytes, one token each."""
    table = {data: token for token, data in alphabet().items()}
    return [table[bytes([byte])] for byte in text.encode()]


def alphabet() -> dict[str, bytes]:
    assert BYTES.piece_bytes is not None
    tokens = [(t, i) for t, i in BYTES._backend.get_vocab().items() if len(t) == 1]
    return {t: BYTES.piece_bytes[i] for t, i in tokens}


def test_every_cut_of_a_multibyte_text() -> None:
    ids: list[int] = [BYTES.token_id(c) for c in byte_tokens("é日😀")]  # type: ignore[misc]
    for cuts in itertools.product([False, True], repeat=len(ids) - 1):
        parts, part = [], [ids[0]]
        for cut, token in zip(cuts, ids[1:], strict=True):
            if cut:
                parts.append(part)
                part = []
            part.append(token)
        assert streamed(BYTES, [*parts, part]) == "é日😀"


def test_unfinished_character_is_flushed_and_unknown_ids_are_nothing() -> None:
    first: int = BYTES.token_id(byte_tokens("日")[0])  # type: ignore[assignment]
    assert streamed(BYTES, [[first], [10**6], [first]]) == "\ufffd\ufffd"


def test_special_token_inside_a_character_does_not_break_it() -> None:
    ids: list[int] = [BYTES.token_id(c) for c in byte_tokens("日")]  # type: ignore[misc]
    mixed = [ids[0], 0, ids[1], 1, ids[2]]
    assert streamed(BYTES, [[i] for i in mixed]) == "日" == BYTES.decode(mixed)


def test_sentencepiece_bytes_and_spaces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_sentencepiece(tmp_path / "m.gguf")))
    rng = random.Random(2)
    words = ["▁the", "▁cat", "é", "日", "▁", "\n", "<s>", "<extra>"]
    for _ in range(200):
        ids: list[int] = []
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.5:
                ids.append(tokenizer.token_id(rng.choice(words)))  # type: ignore[arg-type]
            else:  # a character by its bytes
                ids += [3 + byte for byte in rng.choice("é日😀x").encode()]
        whole = streamed(tokenizer, chunks(rng, ids), skip=False)
        # A whole text loses the space that stands for its own beginning; a continuation keeps it.
        assert whole.removeprefix(" ") == tokenizer.decode(ids, False)
    assert streamed(tokenizer, [[tokenizer.token_id("▁the")]]) == " the"  # type: ignore[list-item]


def test_window_keeps_the_space_after_the_prompt_and_leaks_nothing() -> None:
    tokenizer = word_piece()
    rng = random.Random(3)
    for _ in range(200):
        prompt = [rng.randrange(1, 10) for _ in range(rng.randint(1, 8))]
        ids = [rng.randrange(1, 10) for _ in range(rng.randint(1, 12))]
        detokenizer = make_detokenizer(tokenizer, True, prompt)
        text = "".join(map(detokenizer.feed, chunks(rng, ids))) + detokenizer.flush()
        assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)


def run(text: str, pieces: list[str], **params: object) -> tuple[str, str, object, int]:
    """Feeds a text cut into `pieces` as tokens of a made-up vocabulary: what was shown as it came,
    what was shown in all, the stop reason and the number of tokens used."""
    assert "".join(pieces) == text
    tokenizer = FakeTokenizer(pieces)
    output = OutputText(tokenizer, SamplingParams(max_tokens=None, **params), [])  # type: ignore[arg-type]
    shown, used = "", 0
    for token in range(len(pieces)):
        used += output.feed([token])
        shown += output.take()
        if output.stop_reason is not None:
            return shown, shown + output.take(), output.stop_reason, used
    before = shown
    output.finish()
    return before, shown + output.take(), output.stop_reason, used


class FakeTokenizer(Tokenizer):
    """Token i is `pieces[i]`."""

    def __init__(self, pieces: list[str]) -> None:
        self.piece_bytes = [piece.encode() for piece in pieces]
        self.pieces = list(pieces)
        self.special_ids = frozenset()


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads character by character: the first prefix that ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_over_all_cuts(include: bool) -> None:
    rng = random.Random(4)
    for text in ("abcabd", "aabaab", "xaaay"):
        for cuts in itertools.product([False, True], repeat=len(text) - 1):
            pieces = [text[0]]
            for cut, char in zip(cuts, text[1:], strict=True):
                if cut:
                    pieces.append(char)
                else:
                    pieces[-1] += char
            for _ in range(4):
                stops = ["".join(rng.choices("abcd", k=rng.randint(1, 3))) for _ in range(2)]
                result = run(text, pieces, stop=stops, include_stop_str_in_output=include)
                want, reason = expected(text, stops, include)
                assert result[1:3] == (want, reason), (text, pieces, stops)
                assert want.startswith(result[0])  # nothing shown had to be taken back
                ends = list(itertools.accumulate(map(len, pieces)))
                if reason is not None:
                    length = len(want) if include else len(want) + len(reason)
                    assert result[3] == 1 + next(i for i, e in enumerate(ends) if e >= length)


def test_text_is_held_back_only_as_far_as_a_stop_string_reaches() -> None:
    output = OutputText(FakeTokenizer(["abcdef", "g"]), SamplingParams(stop=["xyz"]), [])
    output.feed([0])
    assert output.take() == "abcd"
    output.feed([1])
    assert output.take() == "e"
    output.finish()
    assert output.take() == "fg"


def test_stop_strings_wait_for_min_tokens() -> None:
    pieces = ["a", "b", "a", "b", "c"]
    shown = run("ababc", pieces, stop=["ab"], min_tokens=2)
    assert shown[1:] == ("ab", "ab", 4)  # the first "ab" was complete within two tokens
    assert run("ababc", pieces, stop=["ab"], min_tokens=1)[1:] == ("", "ab", 2)


def test_stop_in_the_middle_of_a_batch_of_tokens() -> None:
    output = OutputText(FakeTokenizer(["a", "b", "c", "d"]), SamplingParams(stop=["bc"]), [])
    assert output.feed([0, 1, 2, 3]) == 3
    assert (output.take(), output.stop_reason) == ("a", "bc")


def test_long_text_is_not_kept() -> None:
    output = OutputText(FakeTokenizer(["word "]), SamplingParams(stop=["never"]), [])
    total = ""
    for _ in range(1000):
        output.feed([0])
        total += output.take()
    output.finish()
    assert total + output.take() == "word " * 1000
    assert len(output._search.text) < 20
