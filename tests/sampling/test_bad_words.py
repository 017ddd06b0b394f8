# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np

from llmserve.core.sampling_params import MAX_BAD_WORD_TOKENS
from tests.helpers.sampling import new_request, new_sampler, reference_logits, sample


def test_greedy_text_equals_the_reference_step_by_step() -> None:
    # Four tokens and short words, so that words of one, two and three tokens are met all the time
    rng = np.random.default_rng()
    sampler = new_sampler(width=4)
    words = {1: [[0]], 2: [[1, 1]], 3: [[2, 3], [3, 2, 1], [0, 0]], 4: [[1, 0, 1], [1]], 5: []}
    requests = {
        slot: new_request(slot, [1, 1, 3, 2], temperature=0.0, bad_words_token_ids=w)
        for slot, w in words.items()
    }
    outputs: dict[int, list[int]] = {slot: [] for slot in words}
    for request in requests.values():
        sampler.add(request)
    changed = 0
    for step in range(40):
        slots = rng.permutation(list(words))[: 5 if step % 3 else 3].tolist()
        logits = rng.normal(size=(len(slots), 4)).astype(np.float32)
        index = [len(outputs[slot]) for slot in slots]
        tokens = sample(sampler, logits, slots, index)
        for row, slot in enumerate(slots):
            expected = reference_logits(logits[row], requests[slot], outputs[slot])
            assert tokens[row] == expected.argmax()
            changed += tokens[row] != logits[row].argmax()
            outputs[slot].append(tokens[row])
    assert changed > 10


def test_the_prompt_is_no_part_of_a_word() -> None:
    sampler = new_sampler(width=4)
    sampler.add(new_request(1, [2], temperature=0.0, bad_words_token_ids=[[2, 3]]))
    assert sample(sampler, np.array([[0.0, 0, 1, 5]]), [1], [0]) == [3]


def test_the_ring_wraps_and_is_rebuilt() -> None:
    # The longest word there can be, found across the end of the ring
    word = [1] * (MAX_BAD_WORD_TOKENS - 1) + [2]
    before = [0] * 700 + word[:-2]
    logits = np.array([[0.0, 1, 5, 0]])
    for drawn_first in (1, 0):
        sampler = new_sampler(width=4)
        sampler.add(new_request(1, [0], before, temperature=0.0, bad_words_token_ids=[word]))
        first = np.zeros((1, 4))
        first[0, drawn_first] = 1
        assert sample(sampler, first, [1], [len(before)]) == [drawn_first]
        expected = 1 if drawn_first == 1 else 2
        assert sample(sampler, logits, [1], [len(before) + 1]) == [expected]
