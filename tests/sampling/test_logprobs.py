# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math

import numpy as np
import pytest
import torch

from tests.helpers.sampling import new_request, new_sampler, reference_kept, reference_logits


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_columns_equal_the_reference(mode: str) -> None:
    rng = np.random.default_rng()
    sampler = new_sampler(width=50, logprobs_mode=mode)
    choices = [
        {"logprobs": 0, "temperature": 0.0}, {"logprobs": 5, "temperature": 0.7, "top_k": 8},
        {}, {"logprobs": -1, "logit_bias": {3: 4.0}, "top_p": 0.8}, {"logprobs": 5},
        {"logprobs": 2, "temperature": 0.0, "frequency_penalty": 1.5},
        {"logprobs": 5, "logprob_token_ids": [7, 7, 49]}, {"logprobs": 0, "logprob_token_ids": [3]},
        {"logprobs": 5, "logprob_token_ids": [1, 2, 0]},
    ]  # fmt: skip
    requests = [new_request(i + 1, [1, 2], [4, 4], **p) for i, p in enumerate(choices)]
    for request in requests:
        sampler.add(request)
    raw = rng.normal(size=(9, 50)).astype(np.float32) * 2
    drawn = sampler.sample(
        torch.from_numpy(raw.copy()), np.arange(1, 10, dtype=np.int32), np.full(9, 2, np.int32)
    )
    columns = drawn.logprob_columns()
    assert sorted(columns) == [0, 1, 3, 4, 5, 6, 7, 8]
    for row, packed in columns.items():
        p, token = requests[row].params, int(drawn.token_ids[row])
        x = raw[row].astype(np.float64)
        if mode == "processed_logprobs":
            x = reference_logits(raw[row], requests[row], [4, 4]) / (p.temperature or 1)
            if p.temperature:
                x[~reference_kept(x, p)] = -math.inf
        expected = _log_softmax(x)
        ids, values, ranks = packed.unpack()
        k = 50 if p.logprobs == -1 else p.logprobs
        given = p.logprob_token_ids
        assert ids.shape == values.shape == (1, 1 + k + len(given))
        assert ids[0, 1 + k :].tolist() == given
        assert ids[0, 0] == token
        assert ranks[0] == 1 + (expected > expected[token]).sum()
        np.testing.assert_allclose(values[0], expected[ids[0]], atol=2e-5)
        np.testing.assert_allclose(values[0, 1 : 1 + k], np.sort(expected)[::-1][:k], atol=2e-5)
        assert len(set(ids[0, 1 : 1 + k].tolist())) == k


@pytest.mark.parametrize("k", [0, 3, -1])
def test_prompt_logprobs_equal_the_reference(k: int) -> None:
    rng = np.random.default_rng()
    logits = rng.normal(size=(150, 30)).astype(np.float32) * 3
    targets = rng.integers(0, 30, 150)
    packed = new_sampler(width=30).prompt_logprobs(
        torch.from_numpy(logits), torch.from_numpy(targets), k
    )
    ids, values, ranks = packed.unpack()
    assert ids.shape == (150, 1 + (30 if k == -1 else k))
    for i in range(150):
        expected = _log_softmax(logits[i].astype(np.float64))
        assert ids[i, 0] == targets[i]
        assert ranks[i] == 1 + (expected > expected[targets[i]]).sum()
        np.testing.assert_allclose(values[i], expected[ids[i]], atol=2e-5)
        np.testing.assert_array_equal(ids[i, 1:], np.argsort(-expected)[: ids.shape[1] - 1])
