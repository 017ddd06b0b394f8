# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""UniProcExecutor returns at once and answers in order."""

import threading

import pytest

from llmserve.core.scheduler_output import SchedulerOutput
from llmserve.executor.registry import EXECUTORS
from llmserve.executor.uniproc import UniProcExecutor
from llmserve.kernels.compilations import compilations
from tests.helpers.tiny_runner import describe_tiny
from tests.helpers.tiny_worker import generate, plan_of, tiny_config, tiny_kv


def make() -> UniProcExecutor:
    executor = UniProcExecutor(tiny_config(), describe_tiny())
    executor.initialize_kv_cache(tiny_kv(executor.load()))
    return executor


def test_registry() -> None:
    for name in EXECUTORS:
        assert EXECUTORS.load(name)


def test_steps_ahead_equal_steps_one_by_one() -> None:
    executor = make()
    ahead = generate(executor, [5, 9, 2, 40], 6)
    executor.shutdown()
    other = make()
    first = generate(other, [5, 9, 2, 40], 1)
    one_by_one = first
    for i in range(1, 6):
        plan = plan_of(i + 1, 3 + i, 1)
        other.forward(plan)
        one_by_one.append(int(other.sample(plan).result().token_ids[0, 0]))
    other.shutdown()
    assert ahead == one_by_one and len(set(ahead)) > 1


def test_says_what_its_worker_compiled() -> None:
    executor = make()
    assert executor.compilations() == {}
    compilations().counts["triton"] += 1
    assert executor.compilations() == {"triton": 1}
    executor.shutdown()


def test_forward_returns_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread is free while the worker's computes."""
    executor = make()
    go = threading.Event()
    real = executor.worker.forward

    def slow(plan: SchedulerOutput) -> None:
        assert go.wait(10)
        real(plan)

    monkeypatch.setattr(executor.worker, "forward", slow)
    done: list[list[int]] = []
    caller = threading.Thread(target=lambda: done.append(generate(executor, [1, 2, 3], 2)))
    caller.start()
    caller.join(0.2)
    assert caller.is_alive() and not done
    go.set()
    caller.join(10)
    assert len(done[0]) == 2
    executor.shutdown()


def test_failure_shows_in_the_handle() -> None:
    executor = make()
    plan = plan_of(1, 500, 1)  # beyond the context
    executor.forward(plan)
    with pytest.raises(IndexError):
        executor.sample(plan).result()
    assert len(generate(executor, [1, 2], 2)) == 2  # the thread lives on
    executor.shutdown()
    executor.shutdown()
