# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Text to token ids and back, by the `tokenizers` library alone."""

import asyncio
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llmserve.errors import ConfigError, ContextLengthError
from llmserve.frontend import gguf_tokenizer
from llmserve.utils.guard import guarded
from llmserve.utils.token_bytes import token_bytes

INLINE_CHARS = 2000  # below this a thread costs more than the encoding
_MAX_VOCAB = 1 << 23  # tables are as long as the highest id
_COMPOSITION = 4  # most code points that Unicode normalization makes one of; none of them is ASCII


class Tokenizer:
    """A loaded tokenizer. `special_tokens` are template variables: "eos_token" -> "</s>".

    `pieces[i]` is the text of token i, or None where its bytes are no whole UTF-8 text;
    `piece_bytes[i]` are its bytes. Both are None where the decoder's output for a token depends on
    its neighbours; then only `decode` is right.
    """

    def __init__(self, backend: Backend, special_tokens: dict[str, str]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size > _MAX_VOCAB:
            raise ConfigError(
                f"the tokenizer has token id {self.vocab_size - 1}, over {_MAX_VOCAB}"
            )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        steps = _steps(backend.decoder, "decoders")
        self.piece_bytes = token_bytes(steps, vocab, self.vocab_size)
        self._composes, bounded = _shortening(backend)
        self.max_chars_per_token = (
            max(map(len, vocab), default=1) if bounded and self.piece_bytes is not None else None
        )
        self.pieces = None if self.piece_bytes is None else [_text(b) for b in self.piece_bytes]

    @cached_property
    def visible_pieces(self) -> list[str | None] | None:
        """`pieces` with special tokens as ""."""
        if self.pieces is None:
            return None
        visible = self.pieces.copy()
        for token in self.special_ids:
            visible[token] = ""
        return visible

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Holds the GIL for about 0.35 us a character; `encode_async` does not."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """All cores, without the GIL."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    async def encode_async(
        self, text: str, add_special_tokens: bool, *, max_tokens: int, param: str | None = None
    ) -> list[int]:
        """Like `encode`, in a thread where that takes long.

        ContextLengthError, naming `param`, for a text that cannot fit into `max_tokens` tokens
        however it is cut.
        """
        least = self._least_tokens(text)
        if least > max_tokens:
            raise ContextLengthError(
                f"This model's maximum context length is {max_tokens} tokens, but the prompt has "
                f"{len(text)} characters, which is at least {least} tokens.",
                param=param,
            )
        if len(text) < INLINE_CHARS:
            return self.encode(text, add_special_tokens)
        return (await asyncio.to_thread(self.encode_batch, [text], add_special_tokens))[0]

    def _least_tokens(self, text: str) -> int:
        if self.max_chars_per_token is None:
            return 0
        factor = _COMPOSITION if self._composes and not text.isascii() else 1
        return -(-len(text) // (factor * self.max_chars_per_token))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The whole text; ids outside the vocabulary give nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; b"" outside the vocabulary."""
        if self.piece_bytes is None:
            return self.token_str(token).encode()
        return self.piece_bytes[token] if 0 <= token < self.vocab_size else b""

    def token_str(self, token: int) -> str:
        """The text of one token by itself; U+FFFD for bytes that are no whole character."""
        if self.piece_bytes is None:
            return self.decode([token], skip_special_tokens=False) if token >= 0 else ""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its vocabulary form."""
        return self._backend.token_to_id(token)


def load_tokenizer(path: str) -> Tokenizer:
    """From a folder with tokenizer.json, or from a .gguf file; ConfigError if it cannot be read."""
    if path.endswith(".gguf"):
        parts = guarded(lambda: gguf_tokenizer.load(path), lambda error: _refuse(path, error))
        return Tokenizer(*parts)
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{path} has no tokenizer.json; other tokenizer files are not supported")
    backend = guarded(lambda: Backend.from_file(str(file)), lambda error: _refuse(file, error))
    config = _read_json(folder / "tokenizer_config.json")
    guarded(
        lambda: _add_missing_tokens(backend, config.get("added_tokens_decoder") or {}),
        lambda error: _refuse(folder / "tokenizer_config.json", error),
    )
    special: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                special[name] = content
    return Tokenizer(backend, special)


def _refuse(file: str | Path, error: Exception) -> NoReturn:
    if isinstance(error, ConfigError):
        raise error
    raise ConfigError(f"{file} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} cannot be read: not a JSON object")
    return value


def _add_missing_tokens(backend: Backend, declared: dict[str, dict[str, Any]]) -> None:
    """tokenizer_config.json may name added tokens that tokenizer.json lacks."""
    known = backend.get_added_tokens_decoder()
    for i, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        if int(i) not in known:
            token = AddedToken(**{k: v for k, v in fields.items() if k != "__type"})
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _steps(component: Any, list_name: str) -> list[dict[str, Any]]:
    """A normalizer's or decoder's settings; those of a sequence one by one."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    steps: list[dict[str, Any]] = settings.get(list_name, [settings])
    return steps


def _shortening(backend: Backend) -> tuple[bool, bool]:
    """Whether characters may be composed before tokenization, and whether that is all that can
    make a text shorter."""
    composes, bounded = False, True
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] in ("NFC", "NFD", "NFKC", "NFKD"):
            composes = True
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            bounded &= pattern is not None and len(pattern) <= len(step["content"])
        else:
            bounded &= step["type"] == "Prepend"
    added = backend.get_added_tokens_decoder().values()
    return composes, bounded and not any(token.lstrip or token.rstrip for token in added)
