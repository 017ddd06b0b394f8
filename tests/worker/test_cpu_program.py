# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import logging

import numpy as np
import pytest
import torch

from llmserve.kernels import cpu
from llmserve.worker import model_runner
from llmserve.worker.cpu_program import DecodeProgram
from tests.helpers.compiler import has_compiler
from tests.helpers.tiny_runner import Driver, random_prompt

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

torch.set_num_threads(1)


def _run(driver: Driver) -> dict[int, list[int]]:
    """Requests that come one by one, and go, with prompts beside the decodes."""
    out: dict[int, list[int]] = {}
    for slot, length in {1: 5, 2: 33, 3: 70, 4: 17}.items():
        driver.add(slot, random_prompt(length, slot), **({"temperature": 1.0} if slot == 2 else {}))
        rows = [s for s in range(1, slot) if s != 1 or slot < 4]
        for todo in (
            dict.fromkeys(rows, 1) | {slot: length},
            *[dict.fromkeys([*rows, slot], 1)] * 5,
        ):
            for row, tokens in driver.step(todo).items():
                out.setdefault(row, []).extend(tokens)
    return out


def test_a_recorded_step_draws_the_tokens_of_the_ops_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And of torch's operations."""
    runs = []
    original = DecodeProgram.run
    counts: list[int] = []

    def counted(self: DecodeProgram, inputs: model_runner.StepInputs) -> torch.Tensor:
        counts.append(len(inputs.input_ids))
        return original(self, inputs)

    monkeypatch.setattr(DecodeProgram, "run", counted)
    for way in ("recorded", "compiled", "torch"):
        if way == "torch":
            monkeypatch.setattr(cpu, "library", lambda: None)
        driver = Driver()
        if way == "recorded":
            driver.runner.record(3)
            assert driver.runner.program is not None
        runs.append(_run(driver))
    assert counts == [1] * 5 + [2] * 5 + [3] * 10  # by slot 4, slot 1 has gone
    assert runs[0] == runs[1] == runs[2]
    assert len(set(np.concatenate(list(runs[0].values())))) > 5


def test_a_model_that_needs_other_operations_is_not_recorded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llmserve"), "propagate", True)
    caplog.set_level("INFO")
    driver = Driver("Gemma3ForCausalLM")
    driver.runner.record(4)
    assert driver.runner.program is None
    assert "not recorded: aten.add.Tensor" in caplog.text


def test_without_compiled_kernels_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "library", lambda: None)
    driver = Driver()
    driver.runner.record(4)
    assert driver.runner.program is None
