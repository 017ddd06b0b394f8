# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np
import pytest
import torch

from llmserve.core.scheduler_output import TokenMask
from llmserve.core.structured_outputs import GrammarSpec
from tests.helpers.sampling import new_request, new_sampler, reference_draw, sample

SPEC = GrammarSpec(backend="xgrammar", kind="regex", text="a")
WIDTH = 40


def _words(*tokens: int) -> list[int]:
    bits = np.zeros(64, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32).tolist()


def _mask(rows: dict[int, list[int]]) -> TokenMask:
    return TokenMask(np.array(list(rows), np.int32), np.array(list(rows.values()), np.int32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_drawn_and_other_rows_are_free(temperature: float) -> None:
    rng = np.random.default_rng()
    logits = rng.normal(size=(4, WIDTH)).astype(np.float32)
    sampler = new_sampler()
    requests = [
        new_request(slot, [1], temperature=temperature, grammar=SPEC if slot in (3, 5) else None)
        for slot in (2, 3, 4, 5)
    ]
    for request in requests:
        sampler.add(request)
    sampler.grammar.mask = _mask({3: _words(7, 33), 5: _words(39)})
    drawn = sample(sampler, logits, [2, 3, 4, 5], [0] * 4)
    kept = logits.copy()
    kept[1, [i for i in range(WIDTH) if i not in (7, 33)]] = -np.inf
    assert drawn[3] == 39
    wanted = [reference_draw(row, r, []) for row, r in zip(kept, requests, strict=True)]
    assert drawn[:3] == wanted[:3]


def test_a_row_without_its_mask_is_never_drawn() -> None:
    sampler = new_sampler()
    for slot in (1, 2):
        sampler.add(new_request(slot, [1], grammar=SPEC))
    logits = np.zeros((2, WIDTH), np.float32)
    for mask in (None, _mask({1: _words(1)}), _mask({2: _words(1), 1: _words(2)})):
        sampler.grammar.mask = mask
        with pytest.raises(AssertionError, match="unmasked"):
            sample(sampler, logits, [1, 2], [0, 0])


def test_the_mask_says_when_the_text_may_end() -> None:
    """min_tokens is in it: forbidding the end here as well could leave nothing."""
    sampler = new_sampler()
    sampler.add(new_request(1, [1], grammar=SPEC, min_tokens=5))
    sampler.grammar.mask = _mask({1: _words(2)})
    assert sample(sampler, np.zeros((1, WIDTH), np.float32), [1], [0]) == [2]


def test_a_draw_without_the_host_is_the_same() -> None:
    """As graphs have it: the mask of all rows, whether bound or not, is on the device."""
    rng = np.random.default_rng()
    sampler, other = new_sampler(), new_sampler()
    sampler._has_kernel = True
    for slot in (1, 2, 3, 4):
        grammar = SPEC if slot in (2, 4) else None
        request = new_request(slot, [1], temperature=slot % 3, seed=slot, grammar=grammar)
        sampler.add(request)
        other.add(request)
    slots, index = np.array([1, 2, 3, 4], np.int32), torch.arange(4)
    for _ in range(5):
        logits = rng.normal(size=(4, WIDTH)).astype(np.float32)
        mask = _mask({2: _words(*rng.permutation(WIDTH)[:5]), 4: _words(39)})
        sampler.grammar.mask = other.grammar.mask = mask
        assert sampler.plain_draw(slots) is True
        words = np.zeros((5, mask.words.shape[1]), np.int32)
        assert sampler.write_mask(slots, words)
        drawn = sampler.draw_plain(
            torch.from_numpy(logits.copy()), torch.from_numpy(slots).long(), index, True,
            torch.from_numpy(words[:4]),
        )  # fmt: skip
        assert drawn[0].tolist() == sample(other, logits, slots.tolist(), index.tolist())
    assert sampler.plain_draw(slots[:1]) is True
    assert not sampler.write_mask(slots[:1], words)
    sampler.add(new_request(5, [1], grammar=SPEC, bad_words_token_ids=[[3]]))
    assert sampler.plain_draw(np.array([5], np.int32)) is None
