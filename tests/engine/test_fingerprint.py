# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What changes the fingerprint, and what does not."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription, ModelSource
from llmserve.engine.fingerprint import content_id, fingerprint
from llmserve.executor.base import ModelFacts

FACTS = ModelFacts(
    architecture="A", logits_width=8, kv_specs=[], weight_bytes=1, kv_bytes_available=1,
    device="cpu", dtype="float32", kernels={"attention": "Torch"},
)  # fmt: skip


def description(path: Path, **changes: Any) -> ModelDescription:
    model = ModelDescription(
        source=ModelSource("gguf", str(path), "m", [str(path)]),
        hf_config={"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}},
        architecture="A", dtype="float32", max_model_len=64, eos_token_ids=[2], bos_token_id=1,
        generation_defaults={}, tokenizer="t", chat_template=None,
    )  # fmt: skip
    return dataclasses.replace(model, **changes)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 8192)
    return path


def of(
    path: Path, facts: ModelFacts = FACTS, device: str = "c", model: Any = None, **flags: Any
) -> str:
    return fingerprint(
        EngineConfig.from_flags(**flags), description(path, **(model or {})), facts, device
    )


def test_names_limits_and_defaults_do_not_change_it(weights: Path, tmp_path: Path) -> None:
    before = of(weights)
    moved = tmp_path / "moved"
    moved.write_bytes(weights.read_bytes())
    assert of(moved) == before
    assert before == of(
        weights,
        msgspec.structs.replace(FACTS, weight_bytes=2, kv_bytes_available=5),
        model={
            "generation_defaults": {"top_p": 0.5}, "chat_template": "x", "tokenizer": "other",
            "max_model_len": 32, "eos_token_ids": [3],
            "hf_config": {"rope_parameters": {"rope_theta": 1e4}, "hidden_size": 64,
                          "_name_or_path": "x", "transformers_version": "9", "eos_token_id": 3},
        },
        max_num_seqs=3, max_model_len=16, seed=7, served_model_name=["x"], max_logprobs=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other card"},
        {"facts": msgspec.structs.replace(FACTS, dtype="bfloat16")},
        {"facts": msgspec.structs.replace(FACTS, kernels={"attention": "Triton"})},
        {"model": {"hf_config": {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e5}}}},
        {"model": {"architecture": "B"}},
        {"load_format": "dummy"},
        {"logits_processors": ["a.b:C"]},
    ],
    ids=str,
)
def test_numerics_change_it(weights: Path, change: dict[str, Any]) -> None:
    assert of(weights, **change) != of(weights)


@pytest.mark.parametrize("at", [slice(0, 1), slice(-1, None), slice(1 << 20, (1 << 20) + 8192)])
def test_contents_change_it(weights: Path, at: slice) -> None:
    """A byte at either end; anywhere between, a run of two samples' distance."""
    before = content_id([str(weights)])
    data = bytearray(weights.read_bytes())
    data[at] = bytes(byte ^ 1 for byte in data[at])
    weights.write_bytes(data)
    assert content_id([str(weights)]) != before
    assert content_id([]) != before


def test_a_version_changes_it(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(weights)
    monkeypatch.setattr("llmserve.engine.fingerprint.version", lambda package: "0")
    assert of(weights) != before


def test_an_empty_file_has_an_id(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert content_id([str(tmp_path / "empty")]) != content_id([])
