# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from llmserve.cli import plan
from llmserve.config.cache import CacheConfig
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription, ModelSource
from llmserve.core.kv_spec import AnyKVSpec, FullAttentionSpec, SlidingWindowSpec
from llmserve.errors import ConfigError
from llmserve.worker.device import DeviceInfo

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "tie_word_embeddings": False, "sliding_window": 4096,
}  # fmt: skip
GEMMA_1B: dict[str, Any] = {
    "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "head_dim": 256,
    "num_key_value_heads": 1, "intermediate_size": 6912, "vocab_size": 262144,
    "tie_word_embeddings": True, "sliding_window": 512, "sliding_window_pattern": 6,
}  # fmt: skip


CONFIG = LLAMA_8B | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
}  # fmt: skip


def described(config: dict[str, Any], architecture: str, files: list[str]) -> ModelDescription:
    return ModelDescription(
        ModelSource("folder", "/m", "m", files), config, architecture, "bfloat16", 8192, [], None,
        {}, "/m", None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "architecture", "published"),
    [
        (LLAMA_8B, "LlamaForCausalLM", 8_030_261_248),
        (GEMMA_1B, "Gemma3ForCausalLM", 999_885_952),
    ],
)
def test_parameters_from_config_are_the_published_ones(
    config: dict[str, Any], architecture: str, published: int
) -> None:
    """Norms and biases, under 0.02 %, are not counted."""
    counted = plan.num_parameters(described(config, architecture, []))
    assert counted == pytest.approx(published, rel=2e-4)


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> str:
    header: dict[str, Any] = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    data = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    return str(path)


def test_parameters_from_headers(tmp_path: Path) -> None:
    files = [
        write_safetensors(tmp_path / "a.safetensors", {"x": [3, 5], "y": [7]}),
        write_safetensors(tmp_path / "b.safetensors", {"z": [2, 2, 2], "scalar": []}),
    ]
    assert plan.num_parameters(described({}, "X", files)) == 15 + 7 + 8 + 1
    (tmp_path / "c.safetensors").write_bytes(b"\xff\xff")
    with pytest.raises(ConfigError, match="c.safetensors is not a readable safetensors file"):
        plan.num_parameters(described({}, "X", [str(tmp_path / "c.safetensors")]))


def specs(config: dict[str, Any], architecture: str) -> list[AnyKVSpec]:
    return plan.kv_specs(described(config, architecture, []), 2)


def test_specs_of_the_families() -> None:
    llama = specs(LLAMA_8B, "LlamaForCausalLM")
    assert llama == [FullAttentionSpec(8, 128, 2)] * 32
    mistral = specs(LLAMA_8B, "MistralForCausalLM")
    assert mistral == [SlidingWindowSpec(8, 128, 2, 4096)] * 32
    gemma = specs(GEMMA_1B, "Gemma3ForCausalLM")
    full = [i for i, spec in enumerate(gemma) if isinstance(spec, FullAttentionSpec)]
    assert full == [5, 11, 17, 23] and gemma[0] == SlidingWindowSpec(1, 256, 2, 512)
    qwen = LLAMA_8B | {"use_sliding_window": False, "max_window_layers": 28}
    assert specs(qwen, "Qwen2ForCausalLM") == [FullAttentionSpec(8, 128, 2)] * 32
    qwen["use_sliding_window"] = True
    windowed = specs(qwen, "Qwen2ForCausalLM")
    assert [isinstance(s, SlidingWindowSpec) for s in windowed] == [False] * 28 + [True] * 4
    listed = qwen | {"layer_types": ["full_attention", "sliding_attention"] * 16}
    windowed = specs(listed, "Qwen2ForCausalLM")
    assert [isinstance(s, SlidingWindowSpec) for s in windowed] == [False, True] * 16


def folder(path: Path) -> str:
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(path / "model.safetensors", {"x": [1024, 1024]})
    return str(path)


def test_plan_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 x 2 layers x 2 heads x 64 x 4 bytes = 2 KiB a token in float32; 4 MiB of weights."""
    argv = [folder(tmp_path), "--skip-tokenizer-init", "--dtype", "float32", "--device", "cpu",
            "--kv-cache-memory-bytes", "1GiB"]  # fmt: skip
    assert plan.run(argv) == 0
    out = capsys.readouterr().out
    assert "weights            4.0 MiB" in out and "KV per token       2.0 KiB" in out
    blocks = (1 << 30) // (2048 * 16) - 1
    assert f"{blocks:,} blocks of 32.0 KiB" in out
    assert f"{2048:>12,} {'4.0 MiB':>14} {blocks // 128:>18,}" in out


def test_weights_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 3 << 20)
    argv = [folder(tmp_path), "--skip-tokenizer-init", "--dtype", "float32", "--device", "cpu"]
    assert plan.run(argv) == 1
    assert "The weights do not fit" in capsys.readouterr().out


def test_kv_budget() -> None:
    device = DeviceInfo("cuda", "card", 12, 96 << 30, True, 0)
    share = CacheConfig(gpu_memory_utilization=0.5)
    assert plan.kv_bytes_available(share, device, 10 << 30) == 38 << 30
    absolute = CacheConfig(gpu_memory=20 << 30)
    assert plan.kv_bytes_available(absolute, device, 10 << 30) == 10 << 30
    own = CacheConfig(kv_cache_memory_bytes=7)
    assert plan.kv_bytes_available(own, device, 10 << 30) == 7


def test_kv_budget_of_a_cpu_is_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = DeviceInfo("cpu", "cpu", 0, 64 << 30, True, 2)
    for free, kv in ((64 << 30, 4 << 30), (9 << 30, 2 << 30)):
        monkeypatch.setattr(plan, "free_memory", lambda free=free: free)
        assert plan.kv_bytes_available(CacheConfig(), cpu, 1 << 30) == kv


def test_hub_model_is_counted_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight pattern is downloaded; the counts come from the hub's header reader."""
    folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    patterns: list[str] = []

    def snapshot(name: str, **keywords: Any) -> str:
        patterns.extend(keywords["allow_patterns"])
        return str(tmp_path)

    def metadata(name: str, **keywords: Any) -> SimpleNamespace:
        assert name == "org/model" and keywords["revision"] == "v1"
        return SimpleNamespace(parameter_count={"BF16": 40, "F32": 2})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    config = EngineConfig.from_flags(model="org/model", revision="v1")
    description, parameters = plan.read(config)
    assert parameters == 42 and description.architecture == "LlamaForCausalLM"
    assert patterns and not any("safetensors" in pattern for pattern in patterns)
