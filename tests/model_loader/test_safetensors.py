# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmserve.errors import ConfigError
from llmserve.model_loader.safetensors import SafetensorsSource


def test_shapes_and_values_over_several_files(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randn(5).bfloat16()
    save_file({"a": a}, tmp_path / "1.safetensors")
    save_file({"b": b}, tmp_path / "2.safetensors")
    source = SafetensorsSource([str(tmp_path / f"{n}.safetensors") for n in (1, 2)])
    assert source.shapes == {"a": (3, 4), "b": (5,)}
    assert torch.equal(source.read("a"), a) and torch.equal(source.read("b"), b)


def test_the_same_tensor_twice(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="tensor a is in another file"):
        SafetensorsSource([str(tmp_path / f"{n}.safetensors") for n in (1, 2)])


GOOD = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


def file_of(header: bytes, data: int, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        file_of(GOOD, 15),
        file_of(GOOD, 17),
        file_of(GOOD, 16, 1 << 63),
        file_of(GOOD, 16, 1 << 40),
        file_of(b"{", 16),
        file_of(GOOD.replace(b"[4]", b"[5]"), 16),
        file_of(GOOD.replace(b"[0,16]", b"[16,32]"), 16),
        file_of(GOOD.replace(b"F32", b"F31"), 16),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="bad.safetensors is not a whole safetensors") as error:
        SafetensorsSource([str(path)])
    assert "\n" not in str(error.value)
    path.write_bytes(file_of(GOOD, 16))
    assert SafetensorsSource([str(path)]).shapes == {"a": (4,)}
