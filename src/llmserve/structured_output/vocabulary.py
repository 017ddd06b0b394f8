# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a grammar must know of the tokenizer: the bytes of every token, and which end a text."""

import json
from collections.abc import Callable
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


def words_where(tokens: list[bytes], num_words: int, test: Callable[[bytes], bool]) -> np.ndarray:
    """int32 [num_words], as in Matcher.fill: the tokens with a text that passes `test`."""
    flags = np.zeros(num_words * 32, np.bool_)
    flags[: len(tokens)] = [bool(text) and test(text) for text in tokens]
    return np.packbits(flags, bitorder="little").view(np.int32)


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


def _read_json(path: str) -> tuple[list[dict[str, Any]], dict[str, int], set[int]]:
    folder = Path(path)
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    entries = data["model"]["vocab"]
    if isinstance(entries, dict):
        vocab = dict(entries)
    else:  # unigram: [token, score] by id
        vocab = {token: i for i, (token, _) in enumerate(entries)}
    special = set()
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    config = folder / "tokenizer_config.json"
    if config.is_file():  # may declare added tokens that tokenizer.json lacks
        declared = json.loads(config.read_text("utf-8")).get("added_tokens_decoder", {})
        added = {int(i): token for i, token in declared.items()} | added
    for i, token in added.items():
        vocab[token["content"]] = i
        if token.get("special"):
            special.add(i)
    decoder = data.get("decoder") or {}
    return decoder.get("decoders", [decoder] if decoder else []), vocab, special
