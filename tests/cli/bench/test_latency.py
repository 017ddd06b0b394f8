# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli.bench import latency


class FakeLLM:
    made: list[dict[str, Any]] = []
    calls: list[tuple[list[dict[str, list[int]]], Any]] = []

    def __init__(self, **flags: Any) -> None:
        self.made.append(flags)

    def generate(self, prompts: Any, params: Any, use_tqdm: bool = True) -> list[Any]:
        self.calls.append((prompts, params))
        return []


def test_rounds_and_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "LLM", FakeLLM)
    monkeypatch.setattr(latency, "vocab_size", lambda flags: 50)
    path = tmp_path / "out.json"
    argv = ["m", "--batch-size", "3", "--input-len", "5", "--output-len", "7", "--num-iters", "4",
            "--num-iters-warmup", "2", "--max-num-seqs", "9",
            "--output-json", str(path)]  # fmt: skip
    assert latency.run(argv) == 0
    assert FakeLLM.made == [{"enable_prefix_caching": False, "model": "m", "max_num_seqs": 9}]
    assert len(FakeLLM.calls) == 6
    prompts, params = FakeLLM.calls[0]
    assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [5, 5, 5]
    assert all(0 <= id < 50 for prompt in prompts for id in prompt["prompt_token_ids"])
    assert params.max_tokens == 7 and params.ignore_eos
    record = json.loads(path.read_text())
    assert len(record["latencies"]) == 4 and record["percentiles"].keys() == {
        "10", "25", "50", "75", "90", "99"
    }  # fmt: skip
    assert "Avg latency: " in capsys.readouterr().out


def test_vocabulary_of_a_config_that_leaves_it_out(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = {"model": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True}
    assert latency.vocab_size(flags) == 262_208
