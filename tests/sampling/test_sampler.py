# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math
from typing import Any

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling import penalties as penalties_module
from llmserve.sampling.sampler import Sampler
from tests.helpers.broken_processor import IN_ADD, IN_APPLY, IN_REMOVE, IN_UPDATE
from tests.helpers.paged import interpret
from tests.helpers.sampling import (
    EOS,
    new_request,
    new_sampler,
    reference_draw,
    reference_kept,
    reference_logits,
    sample,
)

WIDTH = 40


def _random_params(rng: np.random.Generator) -> dict[str, Any]:
    def ids(n: int) -> list[int]:
        return rng.choice(WIDTH, n, replace=False).tolist()

    choices: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.4, 1.0, 1.7])),
        "top_p": float(rng.choice([0.5, 0.9])),
        "top_k": int(rng.integers(1, 30)),
        "min_p": float(rng.choice([0.02, 0.2])),
        "presence_penalty": float(rng.uniform(-2, 2)),
        "frequency_penalty": float(rng.uniform(-2, 2)),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "logit_bias": {t: float(rng.normal()) * 5 for t in ids(4)},
        "allowed_token_ids": ids(25),
        "bad_words_token_ids": [ids(1), *(ids(2) for _ in range(30))],
        "min_tokens": int(rng.integers(1, 8)),
        "stop_token_ids": ids(3),
        "logprobs": int(rng.integers(0, 4)),
    }
    return {name: value for name, value in choices.items() if rng.random() < 0.35}


def _random_requests(rng: np.random.Generator, n: int) -> list[NewRequest]:
    return [
        new_request(
            slot,
            rng.integers(0, WIDTH, 5).tolist(),
            seed=int(rng.integers(-(2**63), 2**63 - 1)),
            **_random_params(rng),
        )
        for slot in rng.permutation(np.arange(1, 16))[:n].tolist()
    ]


def _logits(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, WIDTH)).astype(np.float32) * 3


def test_texts_equal_the_reference_under_random_features_and_batches() -> None:
    rng = np.random.default_rng()
    requests = _random_requests(rng, 15)
    sampler = new_sampler(16, WIDTH)
    for request in requests:
        sampler.add(request)
    outputs: list[list[int]] = [[] for _ in requests]
    for step in range(12):
        some = rng.permutation(15)[: 15 if step % 3 == 0 else rng.integers(1, 15)].tolist()
        logits = _logits(rng, len(some))
        slots, index = [requests[i].slot for i in some], [len(outputs[i]) for i in some]
        for i, row, token in zip(some, logits, sample(sampler, logits, slots, index), strict=True):
            assert token == reference_draw(row, requests[i], outputs[i]), requests[i].params
            outputs[i].append(token)


def test_that_comparison_sees_a_forgotten_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties_module.Penalties, "update", lambda *args: None)
    sampler = new_sampler(8, WIDTH)
    request = new_request(1, [3], temperature=0.0, frequency_penalty=2.0)
    sampler.add(request)
    logits = np.zeros((1, WIDTH), np.float32)
    logits[0, 7], logits[0, 9] = 2, 1
    tokens = [sample(sampler, logits, [1], [i])[0] for i in range(2)]
    assert tokens[1] != reference_draw(logits[0], request, tokens[:1])


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    rng = np.random.default_rng()
    requests = _random_requests(rng, 15)
    together, alone = new_sampler(16, WIDTH), new_sampler(16, WIDTH)
    for request in requests:
        together.add(request)
        alone.add(request)
    for step in range(10):
        order = rng.permutation(15).tolist()
        slots = [requests[i].slot for i in order]
        logits = _logits(rng, 15)
        tokens = sample(together, logits, slots, [step] * 15)
        assert tokens == [
            sample(alone, logits[row : row + 1], [slot], [step])[0]
            for row, slot in enumerate(slots)
        ]


def test_a_resumed_request_draws_what_it_would_have_drawn() -> None:
    rng = np.random.default_rng()
    requests = _random_requests(rng, 10)
    sampler = new_sampler(16, WIDTH)
    for request in requests:
        sampler.add(request)
    logits = [_logits(rng, 10) for _ in range(14)]
    slots = [request.slot for request in requests]
    texts = [sample(sampler, logits[i], slots, [i] * 10) for i in range(14)]
    for cut in (1, 6, 13):
        resumed = new_sampler(16, WIDTH)
        for row, request in enumerate(requests):
            tokens = [*request.token_ids.tolist(), *(texts[i][row] for i in range(cut))]
            resumed.add(
                NewRequest(
                    request.slot, np.array(tokens, np.int32), 5, request.seed, request.params, []
                )
            )
        for i in range(cut, 14):
            assert sample(resumed, logits[i], slots, [i] * 10) == texts[i]


def test_a_reused_slot_keeps_nothing() -> None:
    rng = np.random.default_rng()
    used, fresh = new_sampler(16, WIDTH), new_sampler(16, WIDTH)
    for _ in range(3):
        for request in _random_requests(rng, 15):
            used.add(request)
            sample(used, _logits(rng, 1), [request.slot], [0])
            used.remove(request.slot)
    requests = _random_requests(rng, 15)
    for request in requests:
        used.add(request)
        fresh.add(request)
    slots = [request.slot for request in requests]
    for step in range(6):
        logits = _logits(rng, 15)
        assert sample(used, logits, slots, [step] * 15) == sample(fresh, logits, slots, [step] * 15)


def test_a_request_added_over_another_replaces_it() -> None:
    sampler = new_sampler(16, WIDTH)
    logits = np.zeros((1, WIDTH))
    for token in (8, 3, 11):
        sampler.add(new_request(1, [0], temperature=0.0, logit_bias={token: 1.0}))
        assert sample(sampler, logits, [1], [0]) == [token]


def test_bias_comes_before_penalties() -> None:
    sampler = new_sampler(16, WIDTH)
    params: dict[str, Any] = {"repetition_penalty": 2.0, "logit_bias": {6: -3.0}}
    sampler.add(new_request(1, [6], temperature=0.0, **params))
    logits = np.full((1, WIDTH), -9.0)
    logits[0, 6], logits[0, 7] = 4, 0  # (4 - 3) / 2 = 0.5, but 4 / 2 - 3 = -1
    assert sample(sampler, logits, [1], [0]) == [6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_counts_even_where_it_is_forbidden(bad: float) -> None:
    sampler = new_sampler(16, WIDTH)
    for slot, temperature in [(1, 0.0), (2, 1.0), (3, 1.0)]:
        sampler.add(new_request(slot, [0], temperature=temperature, allowed_token_ids=[4]))
    logits = np.zeros((3, WIDTH))
    logits[:2, 9] = bad
    assert sample(sampler, logits, [1, 2, 3], [0] * 3) == [-1, -1, 4]


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_without_finite_logits_touch_no_other(greedy: bool) -> None:
    rng = np.random.default_rng()
    requests = _random_requests(rng, 12)
    if greedy:
        requests = [new_request(request.slot, [0], temperature=0.0) for request in requests]
    sampler, healthy = new_sampler(16, WIDTH), new_sampler(16, WIDTH)
    for request in requests:
        sampler.add(request)
        healthy.add(request)
    slots = [request.slot for request in requests]
    logits = _logits(rng, 12)
    logits[1, 5:8] = -math.inf  # this alone is fine
    broken = logits.copy()
    broken[2, 7] = math.nan
    broken[4] = math.nan
    broken[5, 3] = math.inf
    broken[9] = -math.inf
    broken[11, [0, 1]] = math.nan, math.inf
    bad = [2, 4, 5, 9, 11]
    for step in range(3):
        expected = sample(healthy, logits, slots, [step] * 12)
        drawn = sampler.sample(
            torch.from_numpy(broken.copy()), np.array(slots, np.int32), np.full(12, step, np.int32)
        )
        assert drawn.tokens[1].nonzero().flatten().tolist() == bad
        for row, token in enumerate(drawn.token_ids.tolist()):
            assert token == (0 if row in bad else expected[row])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_bad_row_of_a_wide_vocabulary_is_invalid(params: dict[str, Any], bad: float) -> None:
    width = 1500
    sampler = new_sampler(4, width)
    for slot in (1, 2):
        sampler.add(new_request(slot, [0], **params))
    logits = np.random.default_rng().normal(size=(2, width)).astype(np.float32)
    healthy = sample(sampler, logits, [1, 2], [0, 0])
    logits[0, slice(None) if bad == -math.inf else 1400] = bad
    assert sample(sampler, logits, [1, 2], [0, 0]) == [-1, healthy[1]]


def test_a_batch_larger_than_the_slots_draws_each_row() -> None:
    # Drafts: rows of one slot with one output index each
    sampler = new_sampler(3, WIDTH)
    sampler.add(new_request(1, [0], top_k=20))
    logits = _logits(np.random.default_rng(), 7)
    alone = [sample(sampler, logits[i : i + 1], [1], [i])[0] for i in range(7)]
    assert sample(sampler, logits, [1] * 7, list(range(7))) == alone


@pytest.mark.parametrize("params", [{"temperature": 0.7}, {"top_k": 6, "temperature": 0.7}])
def test_processed_logprobs_are_of_what_was_drawn_from(params: dict[str, Any]) -> None:
    sampler = new_sampler(3, WIDTH, logprobs_mode="processed_logprobs")
    sampler.add(new_request(2, [0], logprobs=9, **params))
    logits = _logits(np.random.default_rng(), 1)
    drawn = sampler.sample(
        torch.from_numpy(logits.copy()), np.array([2], np.int32), np.zeros(1, np.int32)
    )
    ids, values, _ = drawn.logprob_columns()[0].unpack()
    x = logits[0].astype(np.float64) / 0.7
    x[~reference_kept(x, new_request(2, [0], **params).params)] = -math.inf
    expected = x - np.log(np.exp(x).sum())
    np.testing.assert_allclose(np.ravel(values), expected[np.ravel(ids)], atol=1e-4)


if not envs.TRITON_INTERPRET:

    def test_the_kernels_draw_the_same() -> None:
        names = ("texts", "finite", "forbids", "padding", "bad_", "larger", "processed", "replaces")
        interpret(
            "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", " or ".join(names), __file__
        )


def test_a_request_that_forbids_every_token_is_invalid_and_alone_in_it() -> None:
    sampler = new_sampler(16, WIDTH)
    shared: dict[str, Any] = {"allowed_token_ids": [2], "min_tokens": 4}  # 2 ends the text
    sampler.add(new_request(1, [0], temperature=0.0, **shared))
    sampler.add(new_request(2, [0], **shared))
    sampler.add(new_request(3, [0], top_p=0.9, **shared))
    sampler.add(new_request(4, [0], allowed_token_ids=[6]))
    logits = np.ones((4, WIDTH))
    assert sample(sampler, logits, [1, 2, 3, 4], [0] * 4) == [-1, -1, -1, 6]
    assert sample(sampler, logits, [1, 2, 3, 4], [4] * 4) == [2, 2, 2, 6]


def test_an_empty_batch_and_padding() -> None:
    sampler = new_sampler(16, WIDTH)
    sampler.add(new_request(3, [0], temperature=0.0))
    logits = np.zeros((3, WIDTH))
    logits[:, 11] = 1
    assert sample(sampler, logits[:0], [], []) == []
    assert sample(sampler, logits, [3, 0, 0], [0, 0, 0])[0] == 11


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_p": 0.8},
        {"top_k": 5, "logit_bias": {1: 1.5}},
        {"min_p": 0.1, "repetition_penalty": 1.5},
    ],
)
def test_frequencies_equal_probabilities(params: dict[str, Any]) -> None:
    # 300 seeds x 100 output indices; row i of a step is seed i
    num_seeds, num_steps, width = 300, 100, 24
    sampler = new_sampler(num_seeds + 1, width)
    requests = [new_request(s, [1, 4], seed=s, **params) for s in range(1, num_seeds + 1)]
    for request in requests:
        sampler.add(request)
    raw = np.linspace(3, -5, width).astype(np.float32)  # probabilities from 0.3 to 1e-4
    slots = np.arange(1, num_seeds + 1, dtype=np.int32)
    counts = np.zeros(width)
    for step in range(num_steps):
        if "repetition_penalty" in params and step:
            for request in requests:  # as if nothing had been drawn
                sampler.add(request)
        logits = torch.from_numpy(np.tile(raw, (num_seeds, 1)))
        drawn = sampler.sample(logits, slots, np.full(num_seeds, step, np.int32))
        counts += np.bincount(drawn.token_ids.numpy(), minlength=width)
    x = reference_logits(raw, requests[0], []) / requests[0].params.temperature
    probabilities = np.where(reference_kept(x, requests[0].params), np.exp(x - x.max()), 0)
    expected = probabilities / probabilities.sum() * num_seeds * num_steps
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = max(kept.sum() - 1, 1)
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_the_far_tail_is_drawn_as_often_as_it_should_be() -> None:
    # One likely token against 49,151 of 4e-6 each: 800 draws, about 158 of them in the tail, where
    # noise with 24 bits would show a grid
    width, num_steps, weight = 49152, 100, 5e-6
    sampler = new_sampler(9, width)
    for slot in range(1, 9):
        sampler.add(new_request(slot, [0], seed=slot))
    logits = np.full((8, width), math.log(weight), np.float32)
    logits[:, 17] = 0
    tail = []
    for step in range(num_steps):
        drawn = sample(sampler, logits, list(range(1, 9)), [step] * 8)
        tail += [token for token in drawn if token != 17]
    share = weight * (width - 1) / (1 + weight * (width - 1))
    num_draws = 8 * num_steps
    assert abs(len(tail) - num_draws * share) < 4 * math.sqrt(num_draws * share * (1 - share))
    assert len(set(tail)) > len(tail) - 4


def test_seeds_indices_and_same_seed() -> None:
    sampler = new_sampler(16, WIDTH)
    for slot, seed in [(1, 5), (2, 5), (3, -6)]:
        sampler.add(new_request(slot, [0], seed=seed))
    logits = np.zeros((3, WIDTH))
    texts = np.array([sample(sampler, logits, [1, 2, 3], [i] * 3) for i in range(60)])
    assert (texts[:, 0] == texts[:, 1]).all()
    assert (texts[:, 0] != texts[:, 2]).mean() > 0.8
    assert len(set(texts[:, 0].tolist())) > 20


def test_logits_of_plain_rows_are_not_touched_by_features_beside_them() -> None:
    rng = np.random.default_rng()
    sampler = new_sampler(16, WIDTH)
    sampler.add(new_request(1, [0], allowed_token_ids=[3], temperature=0.0))
    sampler.add(new_request(2, [0], temperature=0.0))
    sampler.add(new_request(3, [0], frequency_penalty=2.0, temperature=0.0))
    logits = _logits(rng, 3)
    for order in ([1, 2, 3], [2, 1, 3], [3, 1, 2]):
        row = order.index(2)
        given = torch.from_numpy(logits.copy())
        sampler.sample(given, np.array(order, np.int32), np.zeros(3, np.int32))
        assert torch.equal(given[row], torch.from_numpy(logits[row]))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_tokens_and_waits_for_nothing() -> None:
    rng = np.random.default_rng()
    width, n = 50_000, 24
    cuda = Sampler(n + 1, width, torch.device("cuda"), eos_token_ids=EOS)
    cpu = new_sampler(n + 1, width)
    for slot in range(1, n + 1):
        request = new_request(slot, [3, 4], seed=slot, **_random_params(rng))
        cuda.add(request)
        cpu.add(request)
    slots = np.arange(1, n + 1, dtype=np.int32)
    differing: set[int] = set()
    for step in range(30):
        order = rng.permutation(slots) if step % 5 == 0 else slots
        logits = torch.from_numpy(rng.normal(size=(n, width)).astype(np.float32) * 3)
        logits[:, :WIDTH] += 8
        logits[3, 5] = math.nan
        index = np.full(n, step, np.int32)
        on_gpu = logits.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        drawn = cuda.sample(on_gpu, order, index)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        expected = cpu.sample(logits, order, index)
        assert torch.equal(drawn.tokens.cpu(), expected.tokens)
        differing.update(order[(drawn.token_ids.cpu() != expected.token_ids).numpy()].tolist())
        columns = drawn.logprob_columns()
        for row, packed in expected.logprob_columns().items():
            if row != 3 and drawn.token_ids[row] == expected.token_ids[row]:
                for a, b in zip(packed.unpack(), columns[row].unpack(), strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-4)
    assert len(differing) <= 1  # two scores within the last bits of float32


@pytest.mark.parametrize("where", [IN_ADD, IN_APPLY, IN_UPDATE, IN_REMOVE])
def test_a_row_whose_processor_raises_is_lost_alone(where: int) -> None:
    rng = np.random.default_rng()
    options = {"processors": ["tests.helpers.broken_processor:Broken"]}
    sampler, plain = new_sampler(**options), new_sampler()
    requests = _random_requests(rng, 12)
    own = (set(range(1, 16)) - {request.slot for request in requests}).pop()
    requests.append(new_request(own, [4], seed=where, temperature=1.0))
    slots = [request.slot for request in requests]
    for request in requests:
        sampler.add(request)
        if request is not requests[-1]:
            plain.add(request)
    for step in range(5):
        logits = _logits(rng, len(slots))
        want = sample(plain, logits[:-1], slots[:-1], [step] * (len(slots) - 1))
        try:
            drawn = sampler.sample(
                torch.from_numpy(logits.copy()), np.array(slots, np.int32),
                np.full(len(slots), step, np.int32),
            )  # fmt: skip
        except KeyError as error:
            assert (where, step) == (IN_APPLY, 2)
            sampler.break_rows(error, torch.from_numpy(logits), np.array(slots, np.int32))
            drawn = sampler.sample(
                torch.from_numpy(logits.copy()), np.array(slots, np.int32),
                np.full(len(slots), step, np.int32),
            )  # fmt: skip
        got = drawn.token_ids.masked_fill(drawn.tokens[1].bool(), -1).tolist()
        assert got[:-1] == want
        lost_at = {IN_ADD: 0, IN_REMOVE: 5}.get(where, 2)
        assert int(drawn.tokens[1][-1]) == (2 if step >= lost_at else 0)
    sampler.remove(own)
    sampler.add(new_request(own, [4], seed=1, temperature=1.0))
    assert sample(sampler, _logits(rng, 1), [own], [0])[0] >= 0


def test_an_error_of_nobodys_code_is_not_swallowed() -> None:
    sampler = new_sampler()
    sampler.add(new_request(1, [4], logit_bias={3: 1.0}))
    with pytest.raises(RuntimeError, match="out of memory"):
        slots = np.array([1], np.int32)
        sampler.break_rows(RuntimeError("out of memory"), torch.zeros(1, WIDTH), slots)
