# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""FakeExecutor: a function of the tokens alone, whatever the steps; wrong plans are refused."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmserve.core.kv_spec import SlidingWindowSpec
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest
from llmserve.executor.fake import FakeExecutor
from tests.helpers.clock import calibrate, in_time
from tests.helpers.tiny_runner import describe_tiny
from tests.helpers.tiny_worker import generate, plan_of, tiny_config, tiny_kv


def make(**options: Any) -> FakeExecutor:
    model = describe_tiny()
    executor = FakeExecutor(
        tiny_config(), replace(model, hf_config=model.hf_config | {"fake": options})
    )
    executor.initialize_kv_cache(tiny_kv(executor.load()))
    return executor


def new_request(tokens: list[int], num_prompt: int | None = None, **params: Any) -> NewRequest:
    return NewRequest(
        1, np.array(tokens, np.int32), num_prompt or len(tokens), 0, SamplingParams(**params),
        [list(range(1, 9))],
    )  # fmt: skip


def test_tokens_depend_on_all_tokens_and_nothing_else() -> None:
    prompt = [5, 6, 7, 8]
    out = generate(make(), prompt, 6)
    assert out == generate(make(), prompt, 6)
    assert out[0] != generate(make(), [6, 5, 7, 8], 1)[0]
    assert all(0 <= token < 97 for token in out)
    assert len(set(out)) > 2
    resumed = make()
    resumed.forward(plan_of(1, 0, 5, sample=False, new=[new_request([*prompt, *out[:3]], 4)]))
    assert not resumed.sample(plan_of(1, 0, 5, sample=False)).result().num_tokens.any()
    plan = plan_of(2, 5, 2)
    resumed.forward(plan)
    assert resumed.sample(plan).result().token_ids[0, 0] == out[3]


def test_script_and_delay() -> None:
    executor = make(script=[11, 12, 13], delay=0.05)
    start = time.monotonic()
    assert generate(executor, [1, 2], 4) == [11, 12, 13, 11]
    took = time.monotonic() - start
    assert took >= 0.2
    in_time(took, 0.5 + 0.5 * calibrate())
    plan = plan_of(1, 5, 1)
    executor.forward(plan)
    assert executor.sample(plan).result().seconds == 0.05


def test_facts() -> None:
    executor = make(logits_width=50, num_layers=4, num_window_layers=3, window=9)
    facts = executor.load()
    assert facts.logits_width == 50
    assert [isinstance(spec, SlidingWindowSpec) for spec in facts.kv_specs] == [0, 1, 1, 1]


def test_logprobs() -> None:
    executor = make()
    plan = plan_of(1, 0, 3, new=[new_request([7, 8, 9], logprobs=2, prompt_logprobs=1)])
    plan.prompt_logprobs = np.array([True])
    executor.forward(plan)
    output = executor.sample(plan).result()
    ids, logprobs, _ = output.logprobs[0].unpack()
    assert ids.shape == (1, 3) and ids[0, 0] == output.token_ids[0, 0] and (logprobs < 0).all()
    ids, _, _ = output.prompt_logprobs[0].unpack()
    assert ids[:, 0].tolist() == [8, 9] and ids.shape == (2, 2)


@pytest.mark.parametrize(
    ("computed", "count", "sample", "complaint"),
    [
        (1, 1, False, "positions out of order"),
        (2, 3, True, "more positions than tokens"),
        (2, 1, True, "samples where it may not"),
        (2, 2, False, "samples where it may not"),
    ],
)
def test_wrong_plans_are_refused(computed: int, count: int, sample: bool, complaint: str) -> None:
    executor = make()
    executor.forward(plan_of(1, 0, 2, sample=False, new=[new_request([7, 8, 9, 10])]))
    executor.sample(plan_of(1, 0, 2, sample=False))
    with pytest.raises(AssertionError, match=complaint):
        executor.forward(plan_of(2, computed, count, sample))


def test_missing_blocks_are_refused() -> None:
    executor = make()
    request = new_request(list(range(20)))
    request.blocks = [[1]]
    with pytest.raises(AssertionError, match="blocks missing"):
        executor.forward(plan_of(1, 0, 20, new=[request]))


def test_torch_free() -> None:
    code = "import sys, llmserve.executor.fake; print('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": "src"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
