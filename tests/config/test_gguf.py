# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Headers as the gguf package reads them, hostile ones refused, metadata as a config."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llmserve.config import rope
from llmserve.config.gguf import (
    GGUFHeader,
    dtype,
    eos_token_ids,
    generation_defaults,
    hf_config,
    read_header,
)
from llmserve.errors import ConfigError
from tests.helpers.tiny_models import GGUF_FAMILIES, tiny_model, write_tiny_gguf


def test_header_equals_the_packages_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"x.{kind}", 7)
    writer.add_float32("x.f32", 0.1)
    writer.add_float64("x.f64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.text", "héllo")
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.texts", ["a", "", "ü"])
    writer.add_custom_alignment(64)
    writer.add_tensor("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor(
        "b.weight",
        gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header, reader = read_header([str(path)]), gguf.GGUFReader(path)
    expected = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert header.metadata == expected
    assert {name: (t.shape, t.qtype, t.offset, t.nbytes) for name, t in header.tensors.items()} == {
        t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type, t.data_offset, t.n_bytes)
        for t in reader.tensors
    }


def raw(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int = 1,
    num_keys: int = 0,
    keys: bytes = b"",
    name: bytes = b"t",
    dims: tuple[int, ...] = (32,),
    qtype: int = 0,
    offset: int = 0,
    data: int = 128,
) -> bytes:
    info = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    info += b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", qtype, offset)
    head = magic + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + info
    return head + bytes(-len(head) % 32) + bytes(data)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not start with GGUF"),
    "magic": (raw(magic=b"GGML"), "does not start with GGUF"),
    "version": (raw(version=1), "version 1"),
    "past_the_end": (raw(data=127), "ends at byte"),
    "offset": (raw(offset=1 << 60), "ends at byte"),
    "tensor_count": (raw(num_tensors=1 << 62), "does not fit the file"),
    "key_count": (raw(num_keys=1 << 62), "does not fit the file"),
    "dims": (raw(dims=(1,) * 5), "5 dimensions"),
    "huge_shape": (raw(dims=(1 << 40, 1 << 40)), "ends at byte"),
    "unknown_type": (raw(qtype=250), "250"),
    "ragged": (raw(qtype=8, dims=(33,)), "cannot be Q8_0"),
    "long_text": (raw(num_keys=1, keys=key(b"k", 8, struct.pack("<Q", 1 << 60))), "does not fit"),
    "long_array": (
        raw(num_keys=1, keys=key(b"k", 9, struct.pack("<IQ", 10, 1 << 58))),
        "does not fit",
    ),
    "nested": (raw(num_keys=1, keys=key(b"k", 9, struct.pack("<IQ", 9, 1))), "nested"),
    "value_type": (raw(num_keys=1, keys=key(b"k", 99, b"")), "99"),
    "alignment": (
        raw(num_keys=1, keys=key(b"general.alignment", 4, struct.pack("<I", 0))),
        "alignment is 0",
    ),
    "cut_in_the_header": (raw()[:30], "requires a buffer|does not fit"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    data, complaint = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=complaint) as error:
        read_header([str(path)])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_smallest_good_file_is_read(tmp_path: Path) -> None:
    """So that the hostile ones fail for the reason given."""
    path = tmp_path / "good.gguf"
    path.write_bytes(raw())
    assert read_header([str(path)]).tensors["t"].nbytes == 128


def test_split_files_are_one_model(tmp_path: Path) -> None:
    whole = read_header([str(write_tiny_gguf(tmp_path / "a.gguf", "llama"))])
    write_tiny_gguf(tmp_path / "b.gguf", "llama", split=10)
    parts = sorted(map(str, tmp_path.glob("b-*.gguf")))
    header = read_header(parts)
    assert len(parts) > 1 and header.tensors.keys() == whole.tensors.keys()
    assert hf_config(header, "b") == hf_config(whole, "a")
    with pytest.raises(ConfigError, match="in two files"):
        read_header([parts[0], parts[0]])


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_config_equals_the_model_that_was_written(tmp_path: Path, family: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", family)
    ours = hf_config(read_header([str(path)]), str(path))
    ours["rope_parameters"] = rope.normalize(ours)
    theirs = tiny_model(family).config.to_dict()
    theirs["architectures"] = tiny_model(family).config.architectures
    same = ours.keys() & theirs.keys() - {"rms_norm_eps", "query_pre_attn_scalar"}
    assert len(same) >= 11
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert ours["rms_norm_eps"] == pytest.approx(theirs["rms_norm_eps"])
    if family == "gemma3":
        assert ours["query_pre_attn_scalar"] == pytest.approx(24, rel=1e-5)


def edited(tmp_path: Path, family: str, changes: dict[str, Any]) -> GGUFHeader:
    header = read_header([str(write_tiny_gguf(tmp_path / "m.gguf", family))])
    metadata = {key: value for key, value in (header.metadata | changes).items() if value != ...}
    return GGUFHeader(metadata, header.tensors)


def test_gemma_scale_without_the_key(tmp_path: Path) -> None:
    header = edited(tmp_path, "gemma3", {"gemma3.attention.scale": ...})
    assert hf_config(header, "m")["query_pre_attn_scalar"] == 32
    header.metadata["gemma3.block_count"] = 62
    assert hf_config(header, "m")["query_pre_attn_scalar"] == 64 / 4


def test_llama_with_a_window_is_mistral(tmp_path: Path) -> None:
    config = hf_config(edited(tmp_path, "llama", {"llama.attention.sliding_window": 8}), "m")
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 8


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general.architecture": "mamba"}, "'mamba' is not supported"),
        ({"general.architecture": ["llama"]}, "is not supported"),
        ({"llama.block_count": ...}, "no metadata llama.block_count"),
        ({"llama.attention.head_count": [4, 4]}, "head_count must be a positive number"),
        ({"llama.attention.head_count": 0}, "head_count must be a positive number"),
    ],
)
def test_unusable_metadata(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        hf_config(edited(tmp_path, "llama", changes), "m")


def test_eos_by_id_and_by_text() -> None:
    meta = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|eot_id|>", "b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 1,
    }
    assert eos_token_ids(meta) == [3, 1, 2]


def test_sampling_defaults() -> None:
    meta = {"general.sampling.temp": 0.6, "general.sampling.penalty_repeat": 1.1}
    assert generation_defaults(meta) == {"temperature": 0.6, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("quant", "name"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q4_0", "bfloat16")],
)
def test_dtype(tmp_path: Path, quant: str, name: str) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", quant=quant)
    assert dtype(read_header([str(path)])) == name


@pytest.mark.parametrize(
    ("key", "value"), [("tokens", -1), ("eos_token_id", "x"), ("eot_token_id", [1])],
    ids=["tokens", "eos", "eot"],
)  # fmt: skip
def test_token_ids_of_another_kind_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer.ggml.{key}"):
        eos_token_ids({f"tokenizer.ggml.{key}": value})
