# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Small tokenizers, and an engine that says what a test tells it to."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from llmserve.core.messages import (
    AbortRequests,
    EngineOutputs,
    EngineRequest,
    FromEngine,
    ModelInfo,
    RequestExtra,
    SchedulerStats,
    ToEngine,
)
from llmserve.frontend.tokenizer import Tokenizer

TEXT = "the cat sat on the mat; the dog's bone, 12 + 34 = 46. naïve café 日本語 한국어 😀👍🏽 " * 3


def byte_level(vocab_size: int = 340) -> Tokenizer:
    """Byte-level BPE: characters outside ASCII are split over tokens. Id 0 is the end token."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


def word_piece() -> Tokenizer:
    """A decoder that looks at neighbours: spaces are not in the tokens."""
    words = ["[UNK]", "the", "cat", "sat", "##s", "##ing", "play", ",", "on", "mat"]
    backend = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend, {})


SP_WORDS = [
    "▁",
    "t",
    "h",
    "e",
    "c",
    "a",
    "s",
    "▁t",
    "he",
    "▁the",
    "at",
    "▁c",
    "▁cat",
    "ca",
    "é",
    "日",
    "\n",
]


def write_sentencepiece(path: Path, **metadata: Any) -> Path:
    """A GGUF with a SentencePiece vocabulary: 3 control tokens, 256 bytes, SP_WORDS, one more."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SP_WORDS, "<extra>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(SP_WORDS) + [4]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return _finish(writer, path, metadata)


def write_byte_level(path: Path, backend: Backend, pre: str, **metadata: Any) -> Path:
    """A GGUF with the vocabulary and merges of a byte-level tokenizer."""
    state = backend.model
    vocab = backend.get_vocab(with_added_tokens=True)
    folder = path.parent / f"{path.stem}-model"
    folder.mkdir()
    _, merges = state.save(str(folder))
    lines = Path(merges).read_text("utf-8").splitlines()[1:]
    added = backend.get_added_tokens_decoder()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(lines)
    writer.add_token_types(
        [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    )
    writer.add_eos_token_id(0)
    return _finish(writer, path, metadata)


def _finish(writer: GGUFWriter, path: Path, metadata: dict[str, Any]) -> Path:
    for name, value in metadata.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def model_info(**changes: Any) -> ModelInfo:
    """A model of 64 tokens of context and 400 logits."""
    values: dict[str, Any] = {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "max_model_len": 64,
        "logits_width": 400,
        "eos_token_ids": [0],
        "bos_token_id": None,
        "tokenizer": "",
        "chat_template": None,
        "generation_defaults": {},
        "dtype": "float32",
        "num_kv_tokens": 1024,
        "num_kv_blocks": 64,
        "block_size": 16,
        "weight_bytes": 1,
        "kv_specs": [],
        "max_num_batched_tokens": 64,
        "fingerprint": "f",
        "cache_config": {},
    }
    return ModelInfo(**(values | changes))


class FakeHeartbeat:
    """Of an engine that gets on, until a test says otherwise."""

    age = 0.25
    overdue = 0.0

    def late(self, timeout: float) -> bool:
        return self.overdue > timeout


class FakeClient:
    """Records what is sent; `put` makes messages arrive. `on_send` may answer at once."""

    index = 3

    def __init__(self) -> None:
        self.engine = 0
        self.heartbeat = FakeHeartbeat()
        self.sent: list[ToEngine] = []
        self.closed = False
        self.on_send: Any = lambda message: None
        self._arrived: list[FromEngine] = []
        self._read_fd, self._write_fd = os.pipe()

    def fileno(self) -> int:
        return self._read_fd

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)
        self.on_send(message)

    def reconnect(self, engine: int) -> None:
        self.engine = engine

    def put(self, *messages: FromEngine) -> None:
        self._arrived += messages
        os.write(self._write_fd, b"x")

    def receive(self) -> list[FromEngine]:
        if self._arrived:
            os.read(self._read_fd, 1 << 16)
        arrived, self._arrived = self._arrived, []
        return arrived

    def wait(self, timeout: float) -> bool:
        return bool(self._arrived)

    def close(self) -> None:
        if not self.closed:
            os.close(self._read_fd)
            os.close(self._write_fd)
        self.closed = True

    @property
    def requests(self) -> list[EngineRequest]:
        return [message for message in self.sent if isinstance(message, EngineRequest)]

    @property
    def aborted(self) -> list[int]:
        """All ids of all aborts."""
        aborts = [message for message in self.sent if isinstance(message, AbortRequests)]
        return [i for message in aborts for i in message.request_ids]


def step(
    rows: Iterable[tuple[int, int]] = (),
    extras: dict[int, RequestExtra] | None = None,
    stats: SchedulerStats | None = None,
) -> EngineOutputs:
    """One step's message: `rows` are (wire id, token)."""
    rows = list(rows)
    return EngineOutputs(
        ids=np.array([i for i, _ in rows], np.uint32).tobytes(),
        tokens=np.array([t for _, t in rows], np.int32).tobytes(),
        extras=extras or {},
        stats=stats,
    )
