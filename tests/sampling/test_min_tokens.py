# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np

from tests.helpers.sampling import EOS, new_request, new_sampler, sample


def test_end_and_stop_tokens_wait_for_min_tokens() -> None:
    sampler = new_sampler(width=10)
    shared = {"temperature": 0.0, "min_tokens": 3}
    sampler.add(new_request(1, [0], stop_token_ids=[8], **shared))
    sampler.add(new_request(2, [0], ignore_eos=True, **shared))
    sampler.add(new_request(3, [0], temperature=0.0))
    logits = np.array([[0.0, 1, 9, 2, 3, 9, 0, 5, 6, 0]] * 3)
    for index in range(5):
        early = index < 3
        tokens = sample(sampler, logits, [1, 2, 3], [index] * 3)
        assert tokens == ([7, 8, EOS[0]] if early else [EOS[0]] * 3)


def test_a_resumed_request_counts_what_it_drew_before() -> None:
    sampler = new_sampler(width=10)
    logits = np.zeros((1, 10))
    logits[0, 2], logits[0, 9] = 2, 1
    sampler.add(new_request(1, [0], [4, 4], temperature=0.0, min_tokens=3))
    assert [sample(sampler, logits, [1], [i])[0] for i in (2, 3)] == [9, 2]
