# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine's view of a tokenizer against the frontend's."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from llmserve.errors import GrammarError
from llmserve.frontend.tokenizer import load_tokenizer
from llmserve.structured_output.vocabulary import Beginnings, read_vocabulary
from tests.helpers.tiny_models import EOS_ID, VOCAB_SIZE, write_tiny_gguf, write_tokenizer


def _same(path: Path) -> None:
    own = load_tokenizer(str(path))
    assert own.piece_bytes is not None
    vocabulary = read_vocabulary(str(path), own.vocab_size + 20, [EOS_ID, 10**6])
    wanted = [
        b"" if i in own.special_ids or i == EOS_ID else piece
        for i, piece in enumerate(own.piece_bytes)
    ]
    assert vocabulary.tokens == wanted + [b""] * 20
    assert vocabulary.eos_token_ids == [EOS_ID]
    assert sum(map(bool, wanted)) > 200
    named = {i: own.piece_bytes[i] for i in own.special_ids if i != EOS_ID}
    assert vocabulary.special == named and named


def test_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    _same(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gguf(tmp_path: Path, family: str) -> None:
    _same(write_tiny_gguf(tmp_path / "tiny.gguf", family))


def test_logits_may_be_narrower(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert len(read_vocabulary(str(tmp_path), 50, [EOS_ID]).tokens) == 50


def test_what_cannot_be_bound_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(GrammarError, match="end with"):
        read_vocabulary(str(tmp_path), VOCAB_SIZE, [])
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["decoder"] = {"type": "WordPiece"}
    file.write_text(json.dumps(data))
    with pytest.raises(GrammarError, match="bytes of single tokens"):
        read_vocabulary(str(tmp_path), VOCAB_SIZE, [EOS_ID])


def _bits(words: np.ndarray) -> list[int]:
    assert words.dtype == np.int32
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("num_tokens", [31, 32, 500])
def test_beginnings(num_tokens: int) -> None:
    rng = random.Random()
    parts = [*'"}],: aq{', "é"]
    tokens = ["".join(rng.choices(parts, k=rng.randint(0, 4))).encode() for _ in range(num_tokens)]
    begin = Beginnings(tokens)
    assert len(begin.any()) == -(-num_tokens // 32)
    assert _bits(begin.any()) == [i for i, text in enumerate(tokens) if text]
    for letters in (b"}]", b'"', bytes([0xC3]), b"x"):
        wanted = [i for i, text in enumerate(tokens) if text[:1] and text[0] in letters]
        assert _bits(begin.of(letters)) == wanted
        whole = [i for i in wanted if not tokens[i][1:].strip(b"]}")]
        assert _bits(begin.of(letters, rb"(?s:.)[}\]]*")) == whole
