# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Small tables; tests/frontend/test_tokenizer.py compares whole ones with `tokenizers`."""

import random
from typing import Any

from llmserve.utils.token_bytes import token_bytes

REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK: list[dict[str, Any]] = [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]


def test_byte_level() -> None:
    vocab = {"Ġa": 0, "Ċ": 2, "<| x |>": 3, "ÃŁ": 4}
    table = token_bytes([{"type": "ByteLevel"}], vocab, 6)
    assert table == [b" a", b"", b"\n", b"<| x |>", "ß".encode(), b""]


def test_byte_level_of_every_character() -> None:
    """Against the alphabet as GPT-2 has it, character by character."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    stands_for = {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}
    rng = random.Random()
    characters = [*map(chr, range(0x150)), "€", "𝄞"]
    made = {"".join(rng.choices(characters, k=rng.randint(1, 3))) for _ in range(3000)}
    tokens = [*{*characters, *made, "".join(stands_for)}]
    rng.shuffle(tokens)
    table = token_bytes([{"type": "ByteLevel"}], {token: i for i, token in enumerate(tokens)}, 9999)
    assert table is not None and table[len(tokens) :] == [b""] * (9999 - len(tokens))
    for token, found in zip(tokens, table, strict=False):
        known = [stands_for.get(character, -1) for character in token]
        assert found == (token.encode() if -1 in known else bytes(known)), token
    assert token_bytes([{"type": "ByteLevel"}], {}, 1) == [b""]


def test_byte_fallback() -> None:
    vocab = {"▁a": 0, "<0x0A>": 1, "<0xFFF>": 2}
    for steps in (FALLBACK, [*FALLBACK, {"type": "Strip"}]):
        assert token_bytes(steps, vocab, 3) == [b" a", b"\n", b"<0xFFF>"]


def test_others_have_none() -> None:
    assert token_bytes([{"type": "WordPiece"}], {"a": 0}, 1) is None
    regex = REPLACE | {"pattern": {"Regex": "."}}
    assert token_bytes([regex, *FALLBACK[1:]], {"a": 0}, 1) is None
