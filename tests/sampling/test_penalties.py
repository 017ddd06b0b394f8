# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np
import torch

from llmserve.sampling.base import Rows, SamplerContext
from llmserve.sampling.penalties import Penalties
from tests.helpers.sampling import new_request, new_sampler, reference_logits, sample

WIDTH = 12
CPU = torch.device("cpu")


def test_logits_equal_the_definition_before_and_after_draws() -> None:
    rng = np.random.default_rng()
    penalties = Penalties(SamplerContext(6, WIDTH, CPU, []))
    params = [
        {"repetition_penalty": 1.7}, {"frequency_penalty": 0.8}, {"presence_penalty": -1.2},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.5, "presence_penalty": 1.0},
    ]  # fmt: skip
    outputs = [rng.integers(0, WIDTH, size=n).tolist() for n in (0, 3, 6, 9)]
    requests = [
        new_request(slot, rng.integers(0, WIDTH, 4).tolist(), list(output), **p)
        for slot, p, output in zip([5, 2, 1, 4], params, outputs, strict=True)
    ]
    assert all(penalties.add(request.slot, request) for request in requests)
    rows = Rows(np.arange(4), np.array([5, 2, 1, 4]), CPU)
    for _ in range(5):
        raw = rng.normal(size=(4, WIDTH)).astype(np.float32) * 3
        logits = torch.from_numpy(raw.copy())
        penalties.apply(logits, rows)
        expected = [reference_logits(*row) for row in zip(raw, requests, outputs, strict=True)]
        np.testing.assert_allclose(logits.numpy(), np.array(expected), rtol=1e-5, atol=1e-5)
        drawn = rng.integers(0, WIDTH, 4)
        penalties.update(rows, torch.from_numpy(drawn))
        for output, token in zip(outputs, drawn.tolist(), strict=True):
            output.append(token)


def test_neutral_penalties_are_no_work() -> None:
    assert not Penalties(SamplerContext(2, WIDTH, CPU, [])).add(1, new_request(1, [3]))


def test_a_count_is_of_draws_that_the_host_never_saw() -> None:
    # Three draws in flight: each step's penalty knows the tokens of those before it
    sampler = new_sampler(width=4)
    sampler.add(new_request(1, [0], temperature=0.0, frequency_penalty=1.0))
    logits = np.array([[3.0, 2.5, 0.0, 0.0]])
    assert [sample(sampler, logits, [1], [i])[0] for i in range(5)] == [0, 1, 0, 1, 0]
