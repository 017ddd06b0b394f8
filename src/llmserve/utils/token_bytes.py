# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The bytes of each token of a vocabulary, where its decoder maps tokens one by one."""

from typing import Any


def token_bytes(
    decoders: list[dict[str, Any]], vocab: dict[str, int], size: int
) -> list[bytes] | None:
    """By token id, b"" for an id without a token; None where a token's text depends on its
    neighbours.

    `decoders` are the steps of tokenizer.json's decoder. Known are byte-level BPE and SentencePiece
    with byte fallback (whose Strip step concerns the start of a text, never a continuation).
    """
    kinds = [step["type"] for step in decoders]
    table = [b""] * size
    if kinds == ["ByteLevel"]:
        alphabet = _byte_alphabet()
        for token, i in vocab.items():
            try:
                table[i] = bytes([alphabet[char] for char in token])
            except KeyError:  # an added token with characters outside the alphabet
                table[i] = token.encode()
        return table
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        old, new = decoders[0]["pattern"].get("String"), decoders[0]["content"]
        if old is None:
            return None
        for token, i in vocab.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table[i] = bytes.fromhex(token[3:5])
            else:
                table[i] = token.replace(old, new).encode()
        return table
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
