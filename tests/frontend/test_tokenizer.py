# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Encoding, tables and limits, on tokenizers built here."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers

from llmserve.errors import ConfigError, ContextLengthError
from llmserve.frontend.tokenizer import INLINE_CHARS, Tokenizer, load_tokenizer
from tests.helpers.frontend import byte_level, word_piece, write_sentencepiece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder; its config declares a token that tokenizer.json lacks."""
    tokenizer = byte_level()
    (tmp_path / "tokenizer.json").write_text(tokenizer._backend.to_str())
    added = {
        str(tokenizer.vocab_size): {"content": "<|late|>", "special": True, "normalized": False}
    }
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
        "bos_token": None,
        "chat_template": "x",
        "added_tokens_decoder": added,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|user|>"}')
    return tmp_path


def test_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    plain = byte_level()
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "pad_token": "<|user|>"}
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", None)
    late = plain.vocab_size
    assert tokenizer.special_ids == {0, 1, late} and tokenizer.vocab_size == late + 1
    assert tokenizer.encode("the <|end|> cat<|late|>")[-1] == late
    assert tokenizer.decode([*plain.encode("the cat"), late]) == "the cat"
    assert tokenizer.decode([late], skip_special_tokens=False) == "<|late|>"


def test_folder_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_tokenizer(str(folder))


def test_truncation_and_padding_of_the_file_are_off(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert len(load_tokenizer(str(folder)).encode("the cat sat on the mat")) > 2


@pytest.mark.parametrize("make", [byte_level, word_piece])
def test_every_token_by_itself(make: object) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    for token in range(tokenizer.vocab_size):
        assert tokenizer.token_str(token) == tokenizer.decode([token], skip_special_tokens=False)
        assert tokenizer.token_bytes(token).decode("utf-8", "replace") == tokenizer.token_str(token)
    for token in (-1, tokenizer.vocab_size, 10**9):
        assert tokenizer.token_str(token) == "" and tokenizer.token_bytes(token) == b""


def test_bytes_of_a_split_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("日")
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "日"


def test_added_token_outside_the_byte_alphabet() -> None:
    backend = byte_level()._backend
    backend.add_tokens([AddedToken("a b"), AddedToken("日本")])
    tokenizer = Tokenizer(backend, {})
    for token in range(tokenizer.vocab_size - 2, tokenizer.vocab_size):
        assert tokenizer.token_str(token) == tokenizer.decode([token])


def test_long_texts_are_encoded_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    threads: list[threading.Thread] = []
    inner = tokenizer.encode_batch

    def spy(texts: list[str], special: bool) -> list[list[int]]:
        threads.append(threading.current_thread())
        return inner(texts, special)

    monkeypatch.setattr(tokenizer, "encode_batch", spy)

    def encode(text: str) -> list[int]:
        return asyncio.run(tokenizer.encode_async(text, True, max_tokens=10**6))

    short, long = "the cat ", "the cat " * (INLINE_CHARS // 8)
    assert encode(short) == tokenizer.encode(short) and not threads
    assert encode(long) == tokenizer.encode(long)
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_text_that_cannot_fit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = byte_level()._backend
    backend.add_tokens(["x" * 40])
    tokenizer = Tokenizer(backend, {})
    text = "x" * 40 * 50
    assert len(tokenizer.encode(text)) == 50  # the bound is met exactly, so it is no guess
    assert asyncio.run(tokenizer.encode_async(text, True, max_tokens=50, param="p"))
    monkeypatch.setattr(tokenizer, "encode", None)
    monkeypatch.setattr(tokenizer, "encode_batch", None)
    with pytest.raises(ContextLengthError, match=r"maximum context length is 50 tokens.* 51 ") as e:
        asyncio.run(tokenizer.encode_async(text + "x", True, max_tokens=50, param="p"))
    assert e.value.param == "p"


def test_texts_that_shrink_are_not_refused() -> None:
    backend = byte_level()._backend  # composes
    backend.add_tokens([AddedToken("é" * 40, normalized=True)])
    tokenizer = Tokenizer(backend, {})
    ids = asyncio.run(tokenizer.encode_async("e\u0301" * 400, True, max_tokens=10))
    assert ids == [tokenizer.vocab_size - 1] * 10
    backend = byte_level()._backend
    backend.normalizer = normalizers.Strip()
    assert Tokenizer(backend, {}).max_chars_per_token is None
    backend = byte_level()._backend
    backend.add_tokens([AddedToken("<w>", rstrip=True)])
    assert Tokenizer(backend, {}).max_chars_per_token is None


def test_visible_pieces_hide_special_tokens_only(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_sentencepiece(tmp_path / "m.gguf")))
    assert tokenizer.pieces is not None and tokenizer.visible_pieces is not None
    differ = [i for i, p in enumerate(tokenizer.pieces) if p != tokenizer.visible_pieces[i]]
    assert set(differ) == {0, 1, 2} == tokenizer.special_ids
