# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np

from tests.helpers.sampling import new_request, new_sampler, sample


def test_bias_is_added_to_its_own_row_and_token() -> None:
    rng = np.random.default_rng()
    sampler = new_sampler(width=9)
    biases = {1: {3: 5.5, 0: -2.0}, 2: {}, 3: {8: 100.0}, 4: {3: -100.0}}
    for slot, bias in biases.items():
        sampler.add(new_request(slot, [0], temperature=0.0, logit_bias=bias))
    for _ in range(20):
        slots = rng.permutation([1, 2, 3, 4]).tolist()
        logits = rng.normal(size=(4, 9)) * 4
        expected = logits.copy()
        for row, slot in enumerate(slots):
            for token, bias in biases[slot].items():
                expected[row, token] += bias
        assert sample(sampler, logits, slots, [0] * 4) == expected.argmax(1).tolist()
