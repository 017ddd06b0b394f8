# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Order and gates."""

import random

import numpy as np
import pytest

from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.scheduler.policy import Turns, WaitingQueue, order_of, prompt_gates


def _request(order: tuple[int, int]) -> Request:
    message = EngineRequest(
        client=0, request_id=order[1], prompt=np.zeros(order[1] % 5 + 1, np.int32).tobytes(),
        params=SamplingParams(), arrival=0.0, tenant=order[1] % 3,
    )  # fmt: skip
    return Request(message, 100, frozenset(), order=order)


def test_order() -> None:
    arrivals = [(2, 1), (0, 2), (1, 3), (0, 4)]
    assert sorted(arrivals, key=lambda a: order_of("fcfs", *a)) == arrivals
    by_priority = sorted(arrivals, key=lambda a: order_of("priority", *a))
    assert by_priority == [(0, 2), (0, 4), (1, 3), (2, 1)]


@pytest.mark.parametrize(
    ("flags", "todo", "budget", "count"),
    [
        ({}, 50, 100, 50), ({}, 50, 30, 30), ({}, 50, 0, 0),
        ({"long_prefill_token_threshold": 20}, 50, 30, 20),
        ({"long_prefill_token_threshold": 20}, 50, 10, 10),
        ({"enable_chunked_prefill": False}, 50, 100, 50),
        ({"enable_chunked_prefill": False}, 50, 49, 0),
        ({"enable_chunked_prefill": False}, 101, 99, 99),
    ],
)  # fmt: skip
def test_gates(flags: dict[str, bool], todo: int, budget: int, count: int) -> None:
    for gate in prompt_gates(SchedulerConfig(max_num_batched_tokens=100, **flags)):  # type: ignore[arg-type]
        todo = gate(todo, budget)
    assert todo == count


def test_queue_against_a_sorted_list() -> None:
    rng = random.Random(1)
    queue, model, popped = WaitingQueue(), [], 0
    for arrival in range(3000):
        if rng.random() < 0.6:
            request = _request((rng.randrange(3), arrival))
            queue.push(request)
            model.append(request)
        if model and rng.random() < 0.3:
            gone = rng.choice(model)
            gone.finish_reason = "abort"
            queue.discard(gone)
            model.remove(gone)
        if model and rng.random() < 0.3:
            first = min(model, key=lambda r: r.order)
            assert queue.first() is first and queue.pop(first) is first
            model.remove(first)
            popped += 1
        if not model:
            assert queue.first() is None
        assert len(queue) == len(model)
        assert queue.num_prompt_tokens == sum(r.num_prompt_tokens for r in model)
        others = [r for r in model if r.tenant != 1]
        assert queue.first(but=1) is min(others, key=lambda r: r.order, default=None)
        held = sum(map(len, queue._queues.values()))
        assert held <= 2 * len(model) + 130, "the dead are not cleared away"
    assert popped > 500
    assert {r.order for r in queue} == {r.order for r in model}


def test_one_tenant_is_served_by_arrival() -> None:
    rng, turns = random.Random(0), Turns()
    taken: list[int] = []
    for _ in range(500):
        taken.append(turns.take(0, rng.randrange(1, 50), rng.randrange(1000)))
        if rng.random() < 0.5:
            turns.entered(0, rng.choice(taken))
    assert taken == sorted(set(taken))


def test_who_asks_for_little_goes_before_the_backlog_of_others() -> None:
    turns = Turns()
    many = [turns.take(0, 10, 0) for _ in range(100)]
    for turn in many[:30]:
        turns.entered(0, turn)
    few = turns.take(1, 10, 0)
    assert many[29] <= few < many[31]
    assert turns.take(1, 10, 0) == few + 10  # and then they alternate


def test_time_without_requests_is_no_credit() -> None:
    turns = Turns()
    for _ in range(100):
        turns.entered(0, turns.take(0, 10, 0))
    late = [turns.take(1, 10, 0) for _ in range(3)]
    again = turns.take(0, 10, 0)
    assert late[0] < again < late[2]


def test_the_last_place_is_for_another_once_there_is_another() -> None:
    turns = Turns()
    for _ in range(3):
        turns.entered(0, turns.take(0, 10, 0))
    assert not turns.leaves_last(0, 3)  # nobody else has ever asked
    turn = turns.take(1, 10, 0)
    assert turns.leaves_last(0, 3) and not turns.leaves_last(1, 3)
    turns.entered(1, turn)
    assert not turns.leaves_last(0, 4)
    turns.left(1)
    assert turns.leaves_last(0, 3)
    for _ in range(3):
        turns.left(0)
    assert not turns.leaves_last(0, 0)
