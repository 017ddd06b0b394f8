# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GGUF headers: metadata, where tensors lie, and the Hugging Face config they amount to.

Read here rather than by the gguf package's reader, which takes 1.5 s for a vocabulary of 49,152
(measured; this takes 0.1 s), maps before it checks, and is called by three parts of the program.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llmserve.errors import ConfigError

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_MAX_DIMS = 4
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. `shape` is torch's (rows first); bytes [offset, offset + nbytes) of `file`."""

    name: str
    file: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """One model: the metadata of its first file and the tensors of all its files."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Reader:
    """Little-endian values from a file of known length; struct.error past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def take(self, fmt: str) -> Any:
        return struct.unpack("<" + fmt, self.file.read(struct.calcsize("<" + fmt)))[0]

    def count(self, least_bytes: int) -> int:
        n = self.take("Q")
        if n * least_bytes > self.size - self.file.tell():
            raise struct.error(f"a count of {n} does not fit the file")
        return int(n)

    def text(self) -> str:
        return self.file.read(self.count(1)).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        kind = GGUFValueType(kind)
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.take(_SCALARS[kind])
        item = GGUFValueType(self.take("I"))
        if item == GGUFValueType.ARRAY:
            raise struct.error("nested arrays are not supported")
        if item == GGUFValueType.STRING:
            return [self.text() for _ in range(self.count(8))]
        n = self.count(struct.calcsize(_SCALARS[item]))
        fmt = f"<{n}{_SCALARS[item]}"
        return list(struct.unpack(fmt, self.file.read(struct.calcsize(fmt))))


def read_header(files: list[str]) -> GGUFHeader:
    """All of a model's files, each tensor checked to lie within its file. ConfigError names the
    file and what is wrong with it."""
    headers = [_read_file(file, Path(file).stat().st_mtime_ns) for file in files]
    tensors: dict[str, GGUFTensor] = {}
    for header in headers:
        if twice := tensors.keys() & header.tensors.keys():
            raise ConfigError(f"{files[0]}: tensor {min(twice)} is in two files")
        tensors |= header.tensors
    return GGUFHeader(headers[0].metadata, tensors)


@lru_cache(maxsize=4)
def _read_file(path: str, mtime_ns: int) -> GGUFHeader:
    size = Path(path).stat().st_size
    try:
        with open(path, "rb") as file:
            return _parse(_Reader(file, size), path, size)
    except (struct.error, ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a readable GGUF file: {error}") from None


def _parse(reader: _Reader, path: str, size: int) -> GGUFHeader:
    if reader.file.read(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    if (version := reader.take("I")) not in (2, 3):
        raise ValueError(f"version {version} (2 and 3 are known; or it is big-endian)")
    num_tensors, num_keys = reader.count(24), reader.count(13)
    metadata = {}
    for _ in range(num_keys):
        key = reader.text()
        metadata[key] = reader.value(reader.take("I"))
    infos = []
    for _ in range(num_tensors):
        name, dims = reader.text(), reader.take("I")
        if dims > _MAX_DIMS:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(reader.take("Q") for _ in range(dims))[::-1]
        infos.append((name, shape, GGMLQuantizationType(reader.take("I")), reader.take("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-reader.file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, qtype, offset in infos:
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {list(shape)} cannot be {qtype.name}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > size:
            raise ValueError(
                f"tensor {name} ends at byte {start + offset + nbytes}, the file at {size}"
            )
        if name in tensors:
            raise ValueError(f"tensor {name} comes twice")
        tensors[name] = GGUFTensor(name, path, shape, qtype, start + offset, nbytes)
    return GGUFHeader(metadata, tensors)


_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}


def hf_config(header: GGUFHeader, path: str) -> dict[str, Any]:
    """config.json's keys out of GGUF metadata. ConfigError for an unknown architecture or a
    missing key."""
    meta, tensors = header.metadata, header.tensors
    arch = meta.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"{path}: GGUF architecture {arch!r} is not supported (known: {known})")
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{path} has no tensor token_embd.weight")

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in meta:
            raise ConfigError(f"{path} has no metadata {arch}.{key}")
        value = meta[f"{arch}.{key}"]
        if not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{path}: {arch}.{key} must be a positive number, got {value!r}")
        return value

    heads, hidden = need("attention.head_count"), need("embedding_length")
    architecture, model_type = _ARCHITECTURES[arch]
    window = meta.get(f"{arch}.attention.sliding_window")
    if arch == "llama" and window:
        architecture, model_type = "MistralForCausalLM", "mistral"
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": meta.get(f"{arch}.attention.key_length", hidden // heads),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": meta.get(f"{arch}.rope.freq_base", 10_000.0),
    }
    if scaling := _rope_scaling(header, arch):
        config["rope_scaling"] = scaling
    if arch == "gemma3":
        config |= _gemma3(meta, config)
    elif architecture == "MistralForCausalLM":
        config["sliding_window"] = window
    elif arch in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    return config


def _gemma3(meta: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    # The file does not say how scores are scaled: by the head, but in the 27B (62 layers) by
    # hidden / heads; these are llama.cpp's rules.
    if scale := meta.get("gemma3.attention.scale"):
        scalar = scale**-2
    elif config["num_hidden_layers"] == 62:
        scalar = config["hidden_size"] / config["num_attention_heads"]
    else:
        scalar = config["head_dim"]
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta.get("gemma3.attention.sliding_window"),
        "sliding_window_pattern": meta.get("gemma3.attention.sliding_window_pattern", 6),
        "rope_local_base_freq": meta.get("gemma3.rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": meta.get("gemma3.final_logit_softcapping"),
        "attn_logit_softcapping": meta.get("gemma3.attn_logit_softcapping"),
    }


def _rope_scaling(header: GGUFHeader, arch: str) -> dict[str, Any]:
    meta = {
        key.removeprefix(f"{arch}.rope.scaling."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{arch}.rope.scaling.")
    }
    if factors := header.tensors.get("rope_freqs.weight"):
        # Llama 3's scaling comes as one divisor a frequency, which is what longrope's lists are.
        values = np.fromfile(factors.file, "<f4", math.prod(factors.shape), offset=factors.offset)
        length = header.metadata[f"{arch}.context_length"]
        return {
            "rope_type": "longrope",
            "short_factor": values.tolist(),
            "long_factor": values.tolist(),
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }
    kind = meta.get("type", "none")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": meta.get("factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.get("original_context_length")
        scaling |= {
            ours: meta[theirs]
            for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow"))
            if theirs in meta
        }
    return scaling


def token_id(meta: dict[str, Any], kind: str) -> int | None:
    """The id of a special token: "bos", "eos" and so on."""
    value = meta.get(f"tokenizer.ggml.{kind}_token_id")
    if value is not None and (type(value) is not int or value < 0):
        raise ConfigError(f"GGUF metadata tokenizer.ggml.{kind}_token_id is no id: {value!r}")
    return value


def eos_token_ids(meta: dict[str, Any]) -> list[int]:
    """Tokens that end a turn: those named by id, and the well-known ones named only by text."""
    tokens = meta.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise ConfigError(f"GGUF metadata tokenizer.ggml.tokens must be a list, got {tokens!r}")
    named = [token_id(meta, kind) for kind in ("eos", "eot", "eom")]
    by_text = [tokens.index(text) for text in _END_OF_TURN if text in tokens]
    return list(dict.fromkeys(id for id in named + by_text if id is not None))


def generation_defaults(meta: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults under Hugging Face's names."""
    return {
        name: meta[f"general.sampling.{key}"]
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in meta
    }


def dtype(header: GGUFHeader) -> str:
    """Of the embedding; bfloat16 where it is quantized (float16 overflows in Gemma)."""
    names = {GGMLQuantizationType.F32: "float32", GGMLQuantizationType.F16: "float16"}
    return names.get(header.tensors["token_embd.weight"].qtype, "bfloat16")
