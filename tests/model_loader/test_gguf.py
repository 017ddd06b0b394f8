# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every type that the gguf package dequantizes, bit for bit."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf.quants import _type_traits

from llmserve.errors import ConfigError
from llmserve.model_loader.gguf import GGUFSource

TYPES = [Q.F32, Q.F16, *_type_traits]
CONFIG = {"model_type": "qwen2"}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Q]]) -> str:
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_bit_equal_with_the_package(tmp_path: Path, kind: Q) -> None:
    """Random bytes are a valid tensor of any quantized type, infinities and NaN included."""
    generator = np.random.default_rng(int(kind))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, cols = 6, 2 * block
    if kind == Q.F32:
        data = generator.standard_normal((rows, cols)).astype(np.float32)
    elif kind == Q.F16:
        data = generator.standard_normal((rows, cols)).astype(np.float16)
    else:
        data = generator.integers(0, 256, (rows, cols // block * block_bytes), dtype=np.uint8)
    before = np.ones(3, np.float32)  # so that the tensor does not start the data section
    path = write(tmp_path / "m.gguf", {"x.weight": (before, Q.F32), "y.weight": (data, kind)})
    source = GGUFSource([path], CONFIG)
    ours, expected = source.read("y.weight"), gguf.dequantize(data, kind)
    assert source.shapes["y.weight"] == tuple(ours.shape) == (rows, cols)
    assert ours.dtype == torch.float32
    assert ours.numpy().tobytes() == expected.astype(np.float32).tobytes()


def test_integers_cannot_be_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a.weight": (np.ones((2, 4), np.int32), Q.I32)})
    with pytest.raises(ConfigError, match="tensor a.weight is I32, which cannot be dequantized"):
        GGUFSource([path], CONFIG).read("a.weight")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_names_agree_with_the_packages_map(tmp_path: Path, arch: str) -> None:
    """gguf maps Hugging Face's names to its own; ours is the way back."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    theirs = gguf.get_tensor_name_map(kind, 1)
    names = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[kind]}
    skipped = ("rope_freqs", "attn_rot_embd", "_exp", "ffn_gate_inp", "cls", "attn_qkv")
    names = {name for name in names if not any(word in name for word in skipped)}
    ones = (np.ones(2, np.float32), Q.F32)
    path = write(tmp_path / "m.gguf", {f"{name}.weight": ones for name in names})
    config = {"model_type": {"gemma3": "gemma3_text"}.get(arch, arch)}
    ours = {name.removesuffix(".weight") for name in GGUFSource([path], config).shapes}
    assert len(names) >= 12 and {theirs.get_name(name) for name in ours} == names


def test_llama3_frequencies_are_config_not_weights(tmp_path: Path) -> None:
    ones = (np.ones(4, np.float32), Q.F32)
    path = write(tmp_path / "m.gguf", {"rope_freqs.weight": ones, "output_norm.weight": ones})
    assert GGUFSource([path], CONFIG).shapes == {"model.norm.weight": (4,)}
