# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.cli import warmup
from llmserve.errors import ConfigError
from llmserve.kernels.compilations import Compilations, compilations
from llmserve.worker.device import DeviceInfo, present_card
from tests.helpers.dummy_model import write_dummy_model


def test_cards_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def compile_steps(description: Any, dtype: torch.dtype, card: Any, **sizes: int) -> None:
        calls.append((description.architecture, dtype, card.arch, sizes))
        compilations().compiled.update(f"{card.arch} {i}" for i in range(5))
        compilations().found.update(f"{card.arch} {i}" for i in range(3, 7))  # two, but for ours

    monkeypatch.setattr(warmup, "compile_steps", compile_steps)
    folder = str(write_dummy_model(tmp_path, torch_dtype="bfloat16"))
    assert warmup.run([folder, "--card", "sm_90,sm_120", "--max-num-seqs", "33"]) == 0
    sizes = {"max_rows": 33, "max_model_len": 4096, "block_size": 16}
    assert calls == [("Qwen3ForCausalLM", torch.bfloat16, arch, sizes) for arch in (90, 120)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sm_90: 5 kernels compiled, 2 were in the cache, ")
    assert lines[1].startswith("sm_120: 5 kernels compiled, 2 were in the cache, ")


def test_the_card_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []
    config: Any = None

    class Core:
        def shutdown(self) -> None:
            ended.append(config.load.load_format)

    def build(given: Any, description: Any) -> tuple[Core, None]:
        nonlocal config
        config = given
        compilations().compiled.update(("by", "others"))
        compilations().found.update(("by", "there"))
        return Core(), None

    folder = str(write_dummy_model(tmp_path))
    info = DeviceInfo("cuda", "Card 1", 9, 1 << 30, True, 0)
    monkeypatch.setattr(warmup, "detect", lambda requested: info)
    monkeypatch.setattr(warmup, "build", build)
    assert warmup.run([folder, "--max-num-seqs", "3"]) == 0
    assert ended == ["dummy"] and config.scheduler.max_num_seqs == 3
    assert capsys.readouterr().out.startswith("Card 1: 2 kernels compiled, 1 were in the cache, ")


def test_without_a_card_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_dummy_model(tmp_path))
    info = DeviceInfo("cpu", "CPU", 0, 1 << 30, True, 2)
    monkeypatch.setattr(warmup, "detect", lambda requested: info)
    with pytest.raises(ConfigError, match="there is no CUDA device: name the cards"):
        warmup.run([folder])


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each test its own."""
    own = Compilations()
    monkeypatch.setattr(sys.modules[__name__], "compilations", lambda: own)
    monkeypatch.setattr(warmup, "compilations", lambda: own)


@pytest.mark.gpu
def test_a_start_finds_all_that_was_compiled_without_the_card(tmp_path: Path) -> None:
    card = present_card()
    assert card is not None
    folder = write_dummy_model(tmp_path)
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 256, "max_model_len": 1024,
              "kv_cache_memory_bytes": 1 << 28, "attention_backend": "triton_paged"}  # fmt: skip
    (tmp_path / "flags.yaml").write_text(json.dumps(limits))
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    shown = []
    for extra in (["--card", f"sm_{card.arch}"], []):
        command = [sys.executable, "-m", "llmserve", "warmup", str(folder), "--config",
                   str(tmp_path / "flags.yaml"), *extra]  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stderr[-3000:]
        shown.append(done.stdout.splitlines()[-1])
    print(shown)
    assert ": 0 kernels compiled" not in shown[0] and ", 0 were in the cache" in shown[0]
    assert ": 0 kernels compiled" in shown[1], shown
