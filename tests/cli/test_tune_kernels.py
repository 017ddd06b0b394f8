# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli import tune_kernels
from llmserve.errors import ConfigError
from llmserve.kernels.fused_linear import TABLES
from llmserve.kernels.triton_jit import Card
from llmserve.kernels.tune import Product, known_products

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1000, "rope_theta": 1e6,
    "max_position_embeddings": 4096,
}  # fmt: skip
SIZES = ["4096x1024", "1024x2048", "3072x1024g", "1024x3072"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


def test_products_of_a_model(model: Path) -> None:
    for name in (model, model / "config.json"):
        products = tune_kernels.products_of_model(str(name))
        assert [product.key for product in products] == SIZES
        assert [(p.norm, p.act, p.residual) for p in products] == [
            (True, None, False), (False, None, True), (True, "silu", False), (False, None, True)
        ]  # fmt: skip


def test_arguments(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def tune(*args: Any) -> int:
        calls.append(args)
        return 3 if args[4] < 100 else 0

    monkeypatch.setattr(tune_kernels, "present_card", lambda: Card("Card", 90, 132))
    monkeypatch.setattr(tune_kernels, "Bench", lambda device: device)
    monkeypatch.setattr(tune_kernels, "tune", tune)
    assert tune_kernels.run([]) == 0
    card, products, log, output, limit, bench = calls[0]
    assert (card.arch, bench, output) == (90, "cuda", TABLES) and limit == float("inf")
    assert products == known_products() and log.name == "tune-kernels.jsonl"
    argv = [str(model), "--time-limit", "60", "--output", "a.json", "--log", "b.jsonl"]
    assert tune_kernels.run(argv) == 1
    _, products, log, output, limit, _ = calls[1]
    assert (str(log), str(output), limit) == ("b.jsonl", "a.json", 60)
    assert [product.key for product in products] == SIZES
    assert products[0] == Product(4096, 1024, True, None, False)
    assert "3 sizes are left: run it again with --log b.jsonl" in capsys.readouterr().out


def test_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "present_card", lambda: None)
    with pytest.raises(ConfigError, match="measures on a CUDA device, and there is none"):
        tune_kernels.run([])
