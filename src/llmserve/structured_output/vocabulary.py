# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a grammar must know of the tokenizer: the bytes of every token, and which end a text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from llmserve.config.gguf import read_header
from llmserve.errors import GrammarError
from llmserve.utils.token_bytes import token_bytes

_UNKNOWN, _CONTROL = 2, 3  # tokenizer.ggml.token_type
_BYTE_FALLBACK: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_GGUF_DECODERS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{"type": "ByteLevel"}],
    "llama": _BYTE_FALLBACK,
}


class Vocabulary(msgspec.Struct):
    """`tokens[i]` are the bytes of token i, one entry for every logit; b"" can never be written
    (special tokens, logits without a token). `special` are the texts of the special tokens that do
    not end a text: a grammar that names one may have it written."""

    tokens: list[bytes]
    eos_token_ids: list[int]
    special: dict[int, bytes] = {}


def is_plain(token: bytes) -> bool:
    """Whether a JSON string goes on after it: whole characters, none of them a quote or special."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return False
    return bool(text) and min(text) >= " " and '"' not in text and "\\" not in text


def words_where(flags: Sequence[bool] | np.ndarray) -> np.ndarray:
    """The tokens whose flag is set, as in Matcher.fill."""
    bits = np.zeros(-(-len(flags) // 32) * 32, np.bool_)
    bits[: len(flags)] = flags
    return np.packbits(bits, bitorder="little").view(np.int32)


class Beginnings:
    """The tokens by the letters that they begin with, as in Matcher.fill."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens
        self._first = np.array([token[0] if token else -1 for token in tokens], np.int16)

    def any(self) -> np.ndarray:
        """Those that have a text."""
        return words_where(self._first >= 0)

    def of(self, letters: bytes, whole: bytes | None = None) -> np.ndarray:
        """Those that begin with one of the letters, and all of whose text matches `whole`."""
        flags = np.isin(self._first, list(letters))
        if whole is not None:
            found, matches = np.flatnonzero(flags), re.compile(whole).fullmatch
            flags[found] = [matches(self._tokens[i]) is not None for i in found.tolist()]
        return words_where(flags)


def read_vocabulary(path: str, logits_width: int, eos_token_ids: list[int]) -> Vocabulary:
    """Of a folder with tokenizer.json, or of a .gguf file; GrammarError where it cannot be had."""
    decoders, vocab, special = _read_gguf(path) if path.endswith(".gguf") else _read_json(path)
    size = max(logits_width, max(vocab.values(), default=-1) + 1)
    tokens = token_bytes(decoders, vocab, size)
    eos = [token for token in eos_token_ids if 0 <= token < logits_width]
    if tokens is None or not eos:
        lack = "tells the bytes of single tokens" if tokens is None else "has a token to end with"
        raise GrammarError(f"structured output needs a tokenizer that {lack}; this model's is none")
    texts = {token: tokens[token] for token in special.difference(eos) if token < logits_width}
    for token in special.union(eos):
        if token < size:
            tokens[token] = b""
    return Vocabulary(tokens[:logits_width], eos, texts)


def _read_gguf(path: str) -> tuple[list[dict[str, Any]], dict[str, int], set[int]]:
    metadata = read_header([path]).metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", ())
    special = {i for i, kind in enumerate(types) if kind in (_UNKNOWN, _CONTROL)}
    decoders = _GGUF_DECODERS.get(metadata["tokenizer.ggml.model"], [])
    return decoders, {token: i for i, token in enumerate(tokens)}, special


class _Added(msgspec.Struct):
    content: str
    special: bool = False
    id: int = -1  # the name of its entry, in tokenizer_config.json


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _Tokenizer(msgspec.Struct):
    """Of tokenizer.json what is asked here: the merges are most of it."""

    model: _Model
    added_tokens: list[_Added] | None = None
    decoder: dict[str, Any] | None = None


class _Config(msgspec.Struct):
    added_tokens_decoder: dict[int, _Added] = {}


def _read_json(path: str) -> tuple[list[dict[str, Any]], dict[str, int], set[int]]:
    folder = Path(path)
    data = msgspec.json.decode((folder / "tokenizer.json").read_bytes(), type=_Tokenizer)
    vocab = data.model.vocab
    if isinstance(vocab, list):  # unigram: [token, score] by id
        vocab = {token: i for i, (token, _) in enumerate(vocab)}
    special = set()
    added = {token.id: token for token in data.added_tokens or ()}
    config = folder / "tokenizer_config.json"
    if config.is_file():  # may declare added tokens that tokenizer.json lacks
        declared = msgspec.json.decode(config.read_bytes(), type=_Config)
        added = declared.added_tokens_decoder | added
    for i, token in added.items():
        vocab[token.content] = i
        if token.special:
            special.add(i)
    decoder = data.decoder or {}
    return decoder.get("decoders", [decoder] if decoder else []), vocab, special
