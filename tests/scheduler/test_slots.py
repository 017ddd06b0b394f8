# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Slots against lists of tokens."""

import random

import numpy as np

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.scheduler.slots import Slots


def _request(order: int, length: int) -> Request:
    message = EngineRequest(
        client=1, request_id=order, prompt=np.arange(length, dtype=np.int32).tobytes(),
        params=SamplingParams(max_tokens=None), arrival=0.0,
    )  # fmt: skip
    return Request(message, 500, frozenset(), order=(0, order))


def test_tokens_and_order_survive() -> None:
    rng = random.Random(2)
    slots, size = Slots(4, 8), 8
    tokens: dict[int, list[int]] = {}
    flushed_blocks = flushed_rest = 0
    orders = list(range(200))
    rng.shuffle(orders)
    for order in orders:
        if slots.free:
            request = _request(order, rng.randint(1, 20))
            slot = slots.enter(request, 0)
            assert slot != 0 and slots.known[slot] == request.num_tokens
            tokens[slot] = request.token_ids.tolist()
        for _ in range(rng.randint(0, 12)):
            drawn = np.array([s for s in slots.running.tolist() if rng.random() < 0.8], np.int32)
            ids = np.array([rng.randrange(1000) for _ in drawn], np.int32)
            known = slots.append(drawn, ids)
            slots.total[drawn] = known
            for slot, token, n in zip(drawn.tolist(), ids.tolist(), known.tolist(), strict=True):
                tokens[slot].append(token)
                assert len(tokens[slot]) == n
                request = slots.requests[slot]
                assert request is not None
                if n % size == 0:  # as the scheduler does
                    slots.flush(slot, n)
                    assert request.token_ids.tolist() == tokens[slot]
                    flushed_blocks += 1
        slots.check_integrity()
        running = [slots.requests[slot] for slot in slots.running.tolist()]
        assert [r.order for r in running if r] == sorted(r.order for r in running if r)
        if not slots.free or rng.random() < 0.5:
            slot = rng.choice(slots.running.tolist())
            request = slots.requests[slot]
            assert request is not None
            slots.flush(slot, int(slots.known[slot]))
            assert request.token_ids.tolist() == tokens[slot]
            flushed_rest += 1
            slots.leave(slot)
            assert slot in slots.free
    assert flushed_blocks > 50 and flushed_rest > 50
