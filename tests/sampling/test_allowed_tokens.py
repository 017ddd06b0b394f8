# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np

from tests.helpers.sampling import new_request, new_sampler, sample


def test_only_the_list_is_drawn_greedy_or_not() -> None:
    rng = np.random.default_rng()
    sampler = new_sampler(width=30)
    allowed = {1: [4, 29, 7], 2: [0], 3: list(range(30))}
    for slot, ids in allowed.items():
        sampler.add(new_request(slot, [0], temperature=0.0, allowed_token_ids=ids))
        sampler.add(new_request(slot + 3, [0], temperature=2.0, allowed_token_ids=ids))
    for step in range(20):
        logits = rng.normal(size=(6, 30)) * 3
        tokens = sample(sampler, logits, [1, 2, 3, 4, 5, 6], [step] * 6)
        for row, ids in enumerate([*allowed.values()] * 2):
            assert tokens[row] in ids
            if row < 3:
                assert tokens[row] == max(ids, key=lambda t: logits[row, t])
