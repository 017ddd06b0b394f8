# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmserve.cli.bench import throughput


class FakeLLM:
    def __init__(self, **flags: Any) -> None:
        assert flags == {"model": "m"}

    def generate(self, prompts: Any, params: Any, use_tqdm: bool = True) -> list[Any]:
        time.sleep(0.01 * len(prompts))
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * params.max_tokens)])
        return [output] * len(prompts)


def test_rates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "LLM", FakeLLM)
    monkeypatch.setattr(throughput, "vocab_size", lambda flags: 50)
    path = tmp_path / "out.json"
    argv = ["m", "--num-prompts", "10", "--input-len", "4", "--output-len", "6",
            "--output-json", str(path)]  # fmt: skip
    assert throughput.run(argv) == 0
    record = json.loads(path.read_text())
    assert record["num_requests"] == 10 and record["total_num_tokens"] == 100
    assert 50 < record["requests_per_second"] <= 100
    assert record["tokens_per_second"] == pytest.approx(10 * record["requests_per_second"])
    out = capsys.readouterr().out
    assert "Total num prompt tokens:  40" in out and "Total num output tokens:  60" in out
