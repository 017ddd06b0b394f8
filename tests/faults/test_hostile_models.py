# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T41: models that somebody made to do harm are refused in one line, and nothing of them runs.

GGUF files of that kind are in tests/config/test_gguf.py.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.cli.plan import num_parameters
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import describe
from llmserve.errors import ConfigError
from llmserve.frontend.tokenizer import load_tokenizer
from llmserve.model_loader.loader import load_model
from llmserve.models.registry import MODELS
from tests.helpers.server import llmserve
from tests.helpers.tiny_models import write_tiny_model

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("good"), "llama")


def open_model(folder: Path) -> None:
    """As `plan`, then the engine and the API server do, up to the first step."""
    config = EngineConfig.from_flags(model=str(folder), device="cpu")
    num_parameters(describe(config.model, config.load))
    model = describe(config.model, config.load)
    model_class = MODELS.load(model.architecture)
    load_model(model_class, model, config.load, torch.float32, torch.device("cpu"))
    load_tokenizer(model.tokenizer)


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


def nan_shape(fields: dict[str, Any]) -> None:
    fields["model.norm.weight"]["shape"] = [float("nan")]


def far_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["k"] = 2**30
    path.write_text(json.dumps(fields))


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
    "vocabulary_of_2_30": (
        settings("config.json", vocab_size=2**30), "embed_tokens.weight has shape"
    ),
    "layers_without_end": (settings("config.json", num_hidden_layers=10**9), "at most 1000"),
    "context_without_end": (
        settings("config.json", max_position_embeddings=10**15), "a context of 10{15} tokens"
    ),
    "layer_types_of_objects": (
        settings("config.json", layer_types=[{}] * 3, use_sliding_window=True,
                 architectures=["Qwen2ForCausalLM"]), "layer_types must have"
    ),
    "activation_of_a_list": (settings("config.json", hidden_act=[[1]]), "hidden_act .* is not"),
    "rope_theta_of_a_list": (
        settings("config.json", rope_parameters={"rope_theta": [1]}), "rope_theta must be positive"
    ),
    "rope_theta_of_1": (
        settings("config.json", rope_parameters={
            "rope_theta": 1.0, "rope_type": "yarn", "factor": 2.0
        }), "rope parameters .* cannot be used"
    ),
    "rope_factors_of_another_head": (
        settings("config.json", rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 5
        }), "rope parameters .* cannot be used"
    ),
    "temperature_of_text": (
        settings("generation_config.json", temperature="x"), "temperature must be a number"
    ),
    "added_tokens_of_null": (
        settings("tokenizer_config.json", added_tokens_decoder={"2": None}),
        "cannot read .*tokenizer_config.json",
    ),
    "template_without_name": (
        settings("tokenizer_config.json", chat_template=[{}]), "cannot read .*model"
    ),
    "template_of_bytes": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff") and None, "cannot read .*model"
    ),
    "shape_of_nan": (lambda f: header(f, nan_shape), "has shape"),
    "token_id_of_2_30": (lambda f: far_token(f), "token id 1073741824"),
    "hidden_size_of_2_63": (settings("config.json", hidden_size=2**63), "hidden_size must be"),
    "architecture_of_an_object": (
        settings("config.json", architectures=[{}], text_config={}), "not supported|unknown"
    ),
    "rope_of_a_layer_type_of_a_list": (
        settings("config.json", model_type="gemma3_text", rope_parameters={"full_attention": [1]}),
        "rope_parameters of a layer type must be an object",
    ),
    "added_tokens_of_a_number": (
        settings("tokenizer_config.json", added_tokens_decoder=5, eos_token=None),
        "tokenizer_config.json cannot be read",
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


_VALUES = (
    None, True, -1, 0, 1.5, 2**63, 10**30, float("nan"), float("inf"), "", "x", [], [None], [[1]],
    {}, {"a": 1},
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = value if isinstance(value, dict) else range(min(len(value), 3))
    found = []
    for key in keys if isinstance(value, dict | list) else ():
        found += [(*path, key)]
        if isinstance(value[key], dict | list):
            found += _places(value[key], (*path, key))
    return found


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "header"],
)
def test_any_value_anywhere_is_served_or_refused_in_one_line(
    good: Path, tmp_path: Path, name: str
) -> None:
    draw = random.Random(name)
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    file = weights(folder) if name == "header" else folder / name
    own = file.read_bytes()
    refused = 0
    for _ in range(40):
        file.write_bytes(own)
        what: list[Any] = []

        def spoil(fields: dict[str, Any], what: list[Any] = what) -> None:
            *path, last = draw.choice(_places(fields))
            for key in path:
                fields = fields[key]
            fields[last] = draw.choice(_VALUES)
            what += [path, last, fields[last]]

        if name == "header":
            header(folder, spoil)
        else:
            fields = json.loads(own)
            spoil(fields)
            file.write_text(json.dumps(fields))
        try:
            open_model(folder)
        except ConfigError as error:
            refused += 1
            assert error.message.strip() and "\n" not in error.message, what
        except Exception as error:
            raise AssertionError(what) from error
    assert refused or name == "generation_config.json"  # few of its values are read


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
