# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From files to a running model, and one line for each way in which files can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.errors import ConfigError
from llmserve.layers.linear import Linear
from tests.helpers.run_model import description_of, load, prompt_logits, relative_error
from tests.helpers.tiny_models import GGUF_FAMILIES, write_tiny_gguf, write_tiny_model

PROMPTS = [list(range(5, 60))]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m", "llama")


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(folder: Path, **options: Any) -> torch.Tensor:
    return prompt_logits(load(description_of(folder), **options), PROMPTS)[0]


def test_sharded_equals_whole(tmp_path: Path, folder: Path) -> None:
    sharded = write_tiny_model(tmp_path / "sharded", "llama", sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits(sharded), logits(folder))


def test_weight_bytes_count_each_tensor_once(folder: Path) -> None:
    net = load(description_of(folder), dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    assert net.weight_bytes == sum(2 * tensor.numel() for tensor in tensors.values())
    tied = load(description_of(folder, tie_word_embeddings=True), dtype=torch.bfloat16)
    assert tied.weight_bytes == net.weight_bytes - 2 * tensors["lm_head.weight"].numel()


def test_bfloat16_is_near_float32(folder: Path) -> None:
    net = load(description_of(folder), dtype=torch.bfloat16)
    (ours,) = prompt_logits(net, PROMPTS, dtype=torch.bfloat16)
    assert ours.dtype == torch.float32
    assert relative_error(ours, logits(folder)) < 0.1


def test_wrapped_names_are_renamed_and_vision_is_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gemma3")
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    old, new = ("language_model.model.", "language_model."), ("model.language_model.", "")
    for prefix, head in (old, new):
        wrapped = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        wrapped[f"{head}lm_head.weight"] = wrapped[f"{prefix}embed_tokens.weight"].clone()
        wrapped["vision_tower.x"] = wrapped["model.multi_modal_projector.y"] = torch.ones(2)
        target = tmp_path / head / "wrapped"
        target.mkdir(parents=True)
        for file in ("config.json", "tokenizer.json"):
            (target / file).write_bytes((folder / file).read_bytes())
        save_file({k: v.clone() for k, v in wrapped.items()}, target / "model.safetensors")
        assert torch.equal(logits(target), expected)


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    expected = logits(folder)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert torch.equal(logits(folder), expected)


Q = "model.layers.1.self_attn.q_proj.weight"
WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(Q), f"lack tensor {Q} .128, 64."),
    "shape": (
        lambda t: t.update({Q: torch.ones(64, 64)}),
        f"tensor {Q} has shape .64, 64., the config asks for .128, 64.",
    ),
    "transposed": (lambda t: t.update({Q: t[Q].T.contiguous()}), f"tensor {Q} has shape .64, 128."),
    "useless": (
        lambda t: t.update({"model.layers.9.x": torch.ones(1), "model.a": torch.ones(1)}),
        "tensor model.a .and 1 more. has no place in the model",
    ),
    "bias_not_in_config": (
        lambda t: t.update({Q.replace("weight", "bias"): torch.ones(128)}),
        "has no place in the model",
    ),
    "nan": (lambda t: t[Q][3, 3].fill_(torch.nan), f"{Q} is not finite in float32"),
    "inf": (lambda t: t[Q][3, 3].fill_(-torch.inf), f"{Q} is not finite in float32"),
    "integers": (
        lambda t: t.update({Q: t[Q].to(torch.int8)}),
        f"tensor {Q} is int8, the model wants float32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensor_is_named(folder: Path, name: str) -> None:
    change, complaint = WRONG[name]
    edit(folder, change)
    with pytest.raises(ConfigError, match=complaint) as error:
        load(description_of(folder))
    assert "\n" not in str(error.value)


def test_overflow_in_a_narrower_type_is_named(folder: Path) -> None:
    edit(folder, lambda t: t[Q][0, 0].fill_(1e6))
    with pytest.raises(ConfigError, match="not finite in float16"):
        load(description_of(folder), dtype=torch.float16)


def test_unknown_architecture_lists_the_known(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCasualLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="did you mean 'LlamaForCausalLM'.*Qwen3ForCausalLM"):
        load(description_of(folder))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_equals_the_folder_it_was_made_of(tmp_path: Path, family: str) -> None:
    expected = logits(write_tiny_model(tmp_path / "m", family))
    path = write_tiny_gguf(tmp_path / "m.gguf", family, quant="F32", split=7)
    assert relative_error(logits(path), expected) < 1e-5
    near = logits(write_tiny_gguf(tmp_path / "q.gguf", family, quant="Q8_0"))
    assert 1e-5 < relative_error(near, expected) < 0.2


@pytest.mark.parametrize("name", ["linear", "yarn"])
def test_gguf_rope_scaling(tmp_path: Path, name: str) -> None:
    rope = {"rope_type": name, "rope_theta": 1e4, "factor": 4.0}
    if name == "yarn":
        rope["original_max_position_embeddings"] = 32
    config = {"rope_parameters": rope, "max_position_embeddings": 128}
    expected = logits(write_tiny_model(tmp_path / "m", "llama", **config))
    path = write_tiny_gguf(tmp_path / "m.gguf", "llama", quant="F32", **config)
    assert relative_error(logits(path), expected) < 1e-5


def test_dummy_weights_are_the_same_each_time_and_not_the_files(folder: Path) -> None:
    first, second = (logits(folder, load_format="dummy") for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()
    assert first.std() > 0 and not torch.equal(first, logits(folder))


def test_every_linear_is_finalized(folder: Path) -> None:
    net = load(description_of(folder))
    linears = [module for module in net.modules() if isinstance(module, Linear)]
    assert len(linears) == 3 * 4 + 1
    assert all(not list(linear.parameters()) for linear in linears)
