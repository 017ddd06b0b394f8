# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Small tables; tests/frontend/test_tokenizer.py compares whole ones with `tokenizers`."""

from typing import Any

from llmserve.utils.token_bytes import token_bytes

REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK: list[dict[str, Any]] = [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]


def test_byte_level() -> None:
    vocab = {"Ġa": 0, "Ċ": 2, "<| x |>": 3, "ÃŁ": 4}
    table = token_bytes([{"type": "ByteLevel"}], vocab, 6)
    assert table == [b" a", b"", b"\n", b"<| x |>", "ß".encode(), b""]


def test_byte_fallback() -> None:
    vocab = {"▁a": 0, "<0x0A>": 1, "<0xFFF>": 2}
    for steps in (FALLBACK, [*FALLBACK, {"type": "Strip"}]):
        assert token_bytes(steps, vocab, 3) == [b" a", b"\n", b"<0xFFF>"]


def test_others_have_none() -> None:
    assert token_bytes([{"type": "WordPiece"}], {"a": 0}, 1) is None
    regex = REPLACE | {"pattern": {"Regex": "."}}
    assert token_bytes([regex, *FALLBACK[1:]], {"a": 0}, 1) is None
