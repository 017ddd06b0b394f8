# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The bytes of each token of a vocabulary, where its decoder maps tokens one by one."""

from typing import Any

import numpy as np

_NO_BYTE = 256


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
        # All characters in one look: 152k tokens take 25 ms, one by one 150
        alphabet = _byte_alphabet()
        codes = np.frombuffer("".join(vocab).encode("utf-32-le"), np.uint32)
        bytes_ = alphabet[np.minimum(codes, len(alphabet) - 1)]
        ends = np.cumsum([*map(len, vocab)])
        data, start = bytes_.astype(np.uint8).tobytes(), 0
        for i, end in zip(vocab.values(), ends.tolist(), strict=True):
            table[i] = data[start:end]
            start = end
        # Added tokens with characters outside the alphabet
        others = np.searchsorted(ends, np.flatnonzero(bytes_ == _NO_BYTE), side="right")
        tokens = list(vocab)
        for n in set(others.tolist()):
            table[vocab[tokens[n]]] = tokens[n].encode()
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


def _byte_alphabet() -> np.ndarray:
    """uint16 [325]: by the codes of GPT-2's printable stand-ins, the 256 bytes; others _NO_BYTE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = np.full(256 + len(others) + 1, _NO_BYTE, np.uint16)
    alphabet[printable] = printable
    alphabet[256:-1] = others
    return alphabet
