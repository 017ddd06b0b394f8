# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The same request gives the same tokens, however its steps are cut and whoever runs beside it."""

import json

import numpy as np
import pytest
import torch

from llmserve.spec_decode.ngram import NgramProposer
from llmserve.worker.model_runner import StepResult
from llmserve.worker.step_clock import StepClock
from tests.helpers.paged import interpret
from tests.helpers.tiny_runner import CONFIGS, Driver, random_prompt, sample_run

torch.set_num_threads(1)
both = pytest.mark.parametrize("architecture", CONFIGS)


def solo(architecture: str, prompt: list[int], n: int, **params: object) -> list[int]:
    driver = Driver(architecture)
    return driver.generate(driver.add(1, prompt, **params), n)


def plain_forward(driver: Driver, tokens: list[int]) -> torch.Tensor:
    """Logits of every position, by one step over a fresh driver's cache."""
    slot = driver.add(1, tokens, prompt_logprobs=-1)
    driver.step({slot: len(tokens)}, score=(slot,))
    ids, logprobs, _ = driver.output.prompt_logprobs[0].unpack()
    out = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    out.scatter_(1, torch.tensor(ids[:, 1:], dtype=torch.int64), torch.tensor(logprobs[:, 1:]))
    return out


@both
def test_tokens_are_the_argmax_of_whole_forwards(architecture: str) -> None:
    """Cached decoding equals recomputing each prefix: no step leans on another's leftovers."""
    prompt = random_prompt(37, 0)
    out = solo(architecture, prompt, 6)
    assert len(set(out)) > 1
    every = plain_forward(Driver(architecture), [*prompt, *out])
    assert every[len(prompt) - 1 :].argmax(-1).tolist() == out


@both
@pytest.mark.parametrize("chunks", [[1, 36], [16, 16, 5], [7, 1, 29], [36, 1]])
def test_chunked_equals_whole(architecture: str, chunks: list[int]) -> None:
    prompt = random_prompt(37, 1)
    driver = Driver(architecture)
    out = driver.generate(driver.add(1, prompt), 12, chunks)
    assert out == solo(architecture, prompt, 12)


@both
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 11}])
def test_batched_equals_solo(architecture: str, params: dict) -> None:
    """Rows start at different steps, one in chunks, and slots change their owner."""
    prompts = {slot: random_prompt(n, slot) for slot, n in {1: 5, 2: 33, 3: 70, 4: 16}.items()}
    driver = Driver(architecture)
    out: dict[int, list[int]] = {slot: [] for slot in prompts}

    def step(todo: dict[int, int]) -> None:
        for slot, tokens in driver.step(todo).items():
            out[slot] += tokens

    for slot in (1, 2, 3):
        driver.add(slot, prompts[slot], **params)
    step({1: 5, 3: 30})
    step({1: 1, 2: 33, 3: 25})
    step({1: 1, 2: 1, 3: 15})
    driver.release(1)
    first = out.pop(1)
    driver.add(1, prompts[4], **params)
    out[1] = []
    step({3: 1, 1: 16, 2: 1})
    for _ in range(8):
        step({2: 1, 1: 1, 3: 1})
    assert first == solo(architecture, prompts[1], 3, **params)
    assert out[1] == solo(architecture, prompts[4], 9, **params)
    for slot in (2, 3):
        assert out[slot] == solo(architecture, prompts[slot], len(out[slot]), **params)


@both
def test_steps_in_flight(architecture: str) -> None:
    """Two steps are started before the first one's tokens are read."""
    prompt = random_prompt(21, 2)
    driver = Driver(architecture)
    slot = driver.add(1, prompt)
    handles = [driver.start({slot: 21})[1], *(driver.start({slot: 1})[1] for _ in range(5))]
    out = [int(handle.result().token_ids[0, 0]) for handle in handles]
    assert out == solo(architecture, prompt, 6)


def test_a_step_without_draws_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a long prompt's chunks pile up on the device, and plans that are still to be copied
    there are overwritten."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    driver = Driver()
    driver.add(1, random_prompt(21, 2))
    plan, _ = driver.start({1: 9})
    inputs = driver.runner.batcher.build(plan)
    assert not len(inputs.draw_rows)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = driver.runner.clock = StepClock(torch.device("cuda"))
    clock.begin()
    result = StepResult(driver.runner, plan, inputs, None)
    assert done == ["record", "record"]
    output = result.result()
    assert output.num_tokens.tolist() == [0] and output.seconds == 0.002
    assert done == ["record", "record", "synchronize"]


def test_resumed_request_continues() -> None:
    """After preemption a request brings its output along; seeds count on from there."""
    prompt = random_prompt(21, 3)
    params = {"temperature": 0.8, "seed": 5}
    whole = solo("LlamaForCausalLM", prompt, 10, **params)
    driver = Driver()
    driver.generate(driver.add(1, prompt, **params), 4)
    driver.release(1)
    slot = driver.add(2, [*prompt, *whole[:4]], num_prompt=21, **params)
    assert driver.generate(slot, 6, [10, 15]) == whole[4:]


def test_prompt_logprobs_in_chunks() -> None:
    """Positions of all chunks together are those of the whole prompt; each once."""
    prompt = random_prompt(90, 4)
    whole = Driver()
    whole.step({whole.add(1, prompt, prompt_logprobs=3): 90}, score=(1,))
    want = whole.output.prompt_logprobs[0].unpack()
    assert want[0].shape == (89, 4)
    assert want[0][:, 0].tolist() == prompt[1:]
    driver = Driver()
    driver.add(1, prompt, prompt_logprobs=3)
    got = []
    for count in (70, 1, 19):
        driver.step({1: count}, score=(1,))
        got.append(driver.output.prompt_logprobs[0].unpack())
    for column, expected in enumerate(want):
        np.testing.assert_allclose(
            np.concatenate([part[column] for part in got]), expected, atol=1e-5
        )


def test_logprobs_belong_to_their_row() -> None:
    driver = Driver()
    driver.add(1, random_prompt(9, 5))
    driver.add(2, random_prompt(12, 6), logprobs=2)
    drawn = driver.step({1: 9, 2: 12})
    assert list(driver.output.logprobs) == [1]
    ids, _, ranks = driver.output.logprobs[1].unpack()
    assert ids[0, 0] == ids[0, 1] == drawn[2][0] and ranks.tolist() == [1]


def test_invalid_row_is_told() -> None:
    """A row whose logits are NaN is marked, its neighbour is not."""
    driver = Driver()
    driver.add(1, random_prompt(9, 7))
    driver.add(2, [3, *random_prompt(8, 8)])
    want = solo("LlamaForCausalLM", [3, *random_prompt(8, 8)], 1)
    bad = driver.new[0].token_ids
    bad[:] = 50
    with torch.no_grad():
        driver.runner.model.get_parameter("model.embed_tokens.weight")[50] = torch.nan
    assert 50 not in driver.new[1].token_ids
    drawn = driver.step({1: 9, 2: 9})
    assert driver.output.invalid is not None and driver.output.invalid.tolist() == [True, False]
    assert drawn[2] == want


@both
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "seed": 3}])
def test_speculation_keeps_the_text(architecture: str, params: dict) -> None:
    """Drafts of the n-gram proposer change the number of steps and nothing else."""
    prompt = random_prompt(6, 9) * 4
    plain = solo(architecture, prompt, 40, **params)
    driver = Driver(architecture, proposer=NgramProposer(), num_drafts=3)
    slot = driver.add(1, prompt, **params)
    out = driver.step({slot: len(prompt)})[slot]
    steps = accepted = 0
    while len(out) < 40:
        drawn = driver.step({slot: 1}, drafts=3)[slot]
        steps += 1
        accepted += len(drawn) - 1
        out += drawn
    assert out[:40] == plain
    if not params:
        assert accepted > 0 and steps < 39


@pytest.mark.parametrize("good", [True, False])
def test_speculation_counts_only_equal_drafts(good: bool) -> None:
    """With the right guesses every step draws 1 + k tokens; with wrong ones, 1."""
    prompt = random_prompt(20, 10)
    plain = solo("LlamaForCausalLM", prompt, 24)

    class Oracle(NgramProposer):
        def propose(self, token_ids: np.ndarray, k: int) -> np.ndarray:
            done = len(token_ids) - len(prompt)
            guess = np.array(plain[done : done + k], np.int32)
            return guess if good else (guess + 1) % 97

    driver = Driver(proposer=Oracle(), num_drafts=3)
    slot = driver.add(1, prompt)
    out = driver.step({slot: 20})[slot]
    for _ in range(4):
        drawn = driver.step({slot: 1}, drafts=3)[slot]
        assert len(drawn) == (4 if good else 1)
        out += drawn
    assert out == plain[: len(out)]


@both
def test_triton_equals_torch(architecture: str) -> None:
    """The same model through interpreted Triton: attention and every other kernel."""
    want = sample_run(architecture, "torch")
    printed = interpret("tests.helpers.tiny_runner", architecture, "triton_paged")
    got = json.loads(printed.splitlines()[-1])
    assert got["backends"] == ["TritonPagedAttention"] != want["backends"]
    assert got["tokens"] == want["tokens"]
    np.testing.assert_allclose(got["logprobs"], want["logprobs"], atol=2e-4)
