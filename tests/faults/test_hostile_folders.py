# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T41: a model folder that lies or carries code is refused in one line; nothing of it runs."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.clock import TooSlow, calibrate
from tests.helpers.faults import FLAGS
from tests.helpers.server import llmserve
from tests.helpers.tiny_models import write_tiny_gguf

LIMIT_S = 5.0
WEIGHTS = "model.safetensors"


def header(folder: Path) -> tuple[dict[str, dict[str, list[int]]], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(folder: Path, fields: dict[str, dict[str, list[int]]], rest: bytes) -> None:
    text = json.dumps(fields).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + rest)


def past_the_end(folder: Path) -> None:
    fields, rest = header(folder)
    start, end = fields["lm_head.weight"]["data_offsets"]
    fields["lm_head.weight"]["data_offsets"] = [start + (1 << 40), end + (1 << 40)]
    write(folder, fields, rest)


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def giant_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 63).to_bytes(8, "little") + data[8:])


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def code(folder: Path) -> None:
    """Files that only the model's own code could run."""
    (folder / "modeling_evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["EvilForCausalLM"],
        "model_type": "evil",
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def link_out(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def gguf(spoil: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """The folder is one GGUF file, of which `spoil` changes the bytes."""

    def write_file(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        path = write_tiny_gguf(folder / "model.gguf", "llama")
        data = bytearray(path.read_bytes())
        spoil(data)
        path.write_bytes(data)

    write_file.__name__ = f"gguf_{spoil.__name__}"
    return write_file


def many_tensors(data: bytearray) -> None:
    data[8:16] = (1 << 60).to_bytes(8, "little")


def many_keys(data: bytearray) -> None:
    data[16:24] = (1 << 62).to_bytes(8, "little")


def long_key(data: bytearray) -> None:
    data[24:32] = (1 << 63).to_bytes(8, "little")


def half(data: bytearray) -> None:
    del data[len(data) // 2 :]


GGUF = [gguf(spoil) for spoil in (many_tensors, many_keys, long_key, half)]


@pytest.mark.parametrize(
    "spoil",
    [
        past_the_end,
        not_finite,
        code,
        *(
            pytest.param(spoil, marks=pytest.mark.faults)
            for spoil in (truncated, giant_header, pickled, wrong_shape, link_out, pipe, *GGUF)
        ),
    ],
)
def test_t41_hostile_folder(
    bench_model: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # a new one for a second chance
    shutil.copytree(bench_model, folder, dirs_exist_ok=True)
    spoil(folder)
    scale = calibrate()
    began = time.monotonic()
    file = folder / "model.gguf"
    model = file if file.exists() else folder
    run = llmserve("serve", str(model), *FLAGS, "--port", "0")
    took = time.monotonic() - began
    assert run.returncode == 2, run.stdout
    last = run.stdout.rstrip().rpartition("\n")[2]
    assert last.startswith("llmserve: error: ") and len(last) < 400
    assert "Traceback" not in run.stdout
    assert not (folder / "ran").exists()
    if took > LIMIT_S * scale:
        raise TooSlow(f"{took:.1f} s")
