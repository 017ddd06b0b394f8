# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T41: models that somebody made to do harm are refused in one line, and nothing of them runs.

GGUF files of that kind are in tests/config/test_gguf.py.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import describe
from llmserve.errors import ConfigError
from llmserve.model_loader.loader import open_source
from tests.helpers.server import llmserve
from tests.helpers.tiny_models import write_tiny_model

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("good"), "llama")


def open_model(folder: Path) -> None:
    """As the engine does, up to the first tensor."""
    config = EngineConfig.from_flags(model=str(folder), device="cpu")
    model = describe(config.model, config.load)
    source = open_source(model)
    for name in source.shapes:
        source.read(name)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def past_the_end(fields: dict[str, Any]) -> None:
    tensor = next(value for name, value in fields.items() if name != "__metadata__")
    tensor["data_offsets"] = [2**40, 2**40 + 4]


def huge_shape(fields: dict[str, Any]) -> None:
    tensor = next(value for name, value in fields.items() if name != "__metadata__")
    tensor["shape"] = [2**40, 2**20]


def settings(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


CASES: dict[str, tuple[Change, str]] = {
    "truncated": (
        lambda f: os.truncate(weights(f), weights(f).stat().st_size // 2), "not a whole safetensors"
    ),
    "empty": (lambda f: os.truncate(weights(f), 0), "safetensors"),
    "header_of_2_63": (
        lambda f: weights(f).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "safetensors"
    ),
    "header_of_all": (
        lambda f: weights(f).write_bytes(struct.pack("<Q", 2**40) + b"{" * 100), "safetensors"
    ),
    "offset_past_the_end": (lambda f: header(f, past_the_end), "not a whole safetensors"),
    "huge_shape": (lambda f: header(f, huge_shape), "not a whole safetensors"),
    "pickled": (lambda f: weights(f).write_bytes(b"\x80\x04cos\nsystem\n."), "safetensors"),
    "own_code": (
        settings("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}), "never run"
    ),
    "link_to_passwd": (link("tokenizer.json", "/etc/passwd"), "link to a place outside"),
    "link_up": (link("model.safetensors", "../good/model.safetensors"), "link to a place outside"),
    "link_to_nothing": (link("generation_config.json", "/nowhere"), "link to a place outside"),
    "index_outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../good/model.safetensors"}}'
        ) and None,
        "names a file outside its folder",
    ),
    "deep_config": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000) and None,
        "cannot read .*config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(good: Path, tmp_path: Path, case: str) -> None:
    change, says = CASES[case]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in good.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    open_model(folder)
    change(folder)
    with pytest.raises(ConfigError, match=says) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_links_of_the_hubs_cache_are_no_links_out(good: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(good.iterdir()):
        (blobs / str(index)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    open_model(snapshot)
    (snapshot / "extra.json").symlink_to("../../../elsewhere")
    with pytest.raises(ConfigError, match="link to a place outside"):
        open_model(snapshot)


def test_nothing_of_it_runs(good: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    for file in good.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("evil.py", "modeling_llama.py", "configuration_llama.py", "__init__.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    ended = llmserve("serve", str(folder), "--port", "0", timeout=30)
    assert ended.returncode != 0
    assert "has only pickled weights" in ended.stdout.splitlines()[-1]
    assert not canary.exists()
