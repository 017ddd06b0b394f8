# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli.bench import latency, step_profile
from llmserve.cli.bench.step_profile import Floor, report, step_bytes
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import describe
from llmserve.core.kv_spec import FullAttentionSpec, SlidingWindowSpec
from llmserve.errors import ConfigError
from llmserve.worker.device import DeviceInfo
from llmserve.worker.step_trace import Event, Trace
from tests.helpers.api import model_info
from tests.helpers.dummy_model import write_dummy_model

CARD = DeviceInfo("cuda", "Card", 9, 1 << 30, True, 0)
FLAGS = {"device": "cpu", "dtype": "float32", "cpu_threads": 1, "load_format": "dummy",
         "kv_cache_memory_bytes": 1 << 24, "max_model_len": 256}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_a_step_reads(tied: bool, tmp_path: Path) -> None:
    folder = write_dummy_model(tmp_path, tie_word_embeddings=tied, hidden_size=128, vocab_size=500)
    config = EngineConfig.from_flags(model=str(folder), load_format="dummy")
    info = model_info()
    info.dtype, info.weight_bytes = "bfloat16", 1_000_000
    info.kv_specs = [FullAttentionSpec(2, 64, 2), SlidingWindowSpec(2, 64, 2, 10)]
    weights, kv = step_bytes(info, describe(config.model, config.load), 4, 100)
    assert weights == 1_000_000 - (0 if tied else (500 - 4) * 128 * 2)
    assert kv == 4 * (2 * 2 * 64 * 2) * (100 + 10)


def test_report() -> None:
    work = [Event("kernel", "product", 10 * i, 6.0) for i in range(20)]
    work += [Event("kernel", f"small {i}", 200.0 + i, 1.0) for i in range(30)]
    calls = [Event("cuda_runtime", "cudaMalloc", 5.0, 1.0)]
    trace = Trace(10, calls, work)
    text = report(trace, 20.0, 8, 132, Floor(9_000_000, 1_000_000, 1e12))
    lines = text.splitlines()
    assert lines[0].startswith("batch 8, context 132: 0.020 ms a step (400,000 tok/s), device busy")
    assert "busy 0.015 ms, idle 25.0% (34.8% while traced)" in lines[0]
    assert lines[1].startswith(
        "floor 0.010 ms: 0.009 GB of weights and 0.001 GB of KV at 1.00 TB/s"
    )
    assert lines[1].endswith("takes 2.00 times that")
    assert lines[3].split() == ["12.0", "80.0%", "2.0", "product"]
    assert lines[-2].split() == ["1.1", "7.3%", "1.1", "11", "others"]
    assert lines[-1] == "in these 10 steps: 1 x cudaMalloc"


def test_profiles_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine's real loop; what the card would have done is missing on a CPU."""
    folder = write_dummy_model(tmp_path, num_hidden_layers=1, hidden_size=64)
    monkeypatch.setattr(step_profile, "detect", lambda requested: CARD)
    monkeypatch.setattr(step_profile, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(step_profile, "_STEPS", 5)
    counted: list[int] = []
    run_steps = step_profile.run_steps

    def counting(core: Any, count: int) -> None:
        before = core.stats()
        run_steps(core, count)
        after = core.stats()
        counted.append(after.num_tokens_computed - before.num_tokens_computed)
        assert after.num_running == 3

    monkeypatch.setattr(step_profile, "run_steps", counting)
    config = tmp_path / "flags.yaml"
    config.write_text(json.dumps(FLAGS))
    argv = [str(folder), "--config", str(config), "--profile", "--batch-size", "3"]
    assert latency.run(argv) == 0
    assert counted == [60, 15, 15]  # every step decodes every row
    assert capsys.readouterr().out.startswith("batch 3, context 59: ")
    with pytest.raises(ConfigError, match="--input-len 240 and these are over --max-model-len 256"):
        latency.run([*argv, "--input-len", "240"])
    with pytest.raises(ConfigError, match="--batch-size 65 is over --max-num-seqs 64"):
        latency.run([*argv[:-1], "65"])


def test_needs_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = DeviceInfo("cpu", "CPU", 0, 1 << 30, True, 2)
    monkeypatch.setattr(step_profile, "detect", lambda requested: cpu)
    with pytest.raises(ConfigError, match="--profile needs a CUDA device"):
        step_profile.profile_decode({"model": str(write_dummy_model(tmp_path))}, [[1]])
