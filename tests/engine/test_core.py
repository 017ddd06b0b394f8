# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest

from llmserve.core.messages import SchedulerStats
from llmserve.engine.core import EngineCore


class Handle:
    def __init__(self, log: list[str], step: int) -> None:
        self.log, self.step = log, step

    def result(self) -> str:
        self.log.append(f"wait {self.step}")
        return f"tokens {self.step}"


class Recorder:
    """Scheduler and executor in one, writing down in which order the core uses them."""

    def __init__(self, num_plans: int) -> None:
        self.log: list[str] = []
        self.plans = list(range(num_plans))
        self.open = num_plans

    def schedule(self) -> int | None:
        return self.plans.pop(0) if self.plans else None

    def forward(self, plan: int) -> None:
        self.log.append(f"forward {plan}")

    def sample(self, plan: int) -> Handle:
        self.log.append(f"sample {plan}")
        return Handle(self.log, plan)

    def commit(self, plan: int, output: str) -> None:
        assert output == f"tokens {plan}"
        self.log.append(f"commit {plan}")
        self.open -= 1

    def has_unfinished(self) -> bool:
        return self.open > 0

    def compilations(self) -> dict[str, int]:
        return {"triton": len(self.plans)}

    def stats(self) -> SchedulerStats:
        started = list(
            accumulate({"forward": 1, "commit": -1}.get(x.split()[0], 0) for x in self.log)
        )
        return SchedulerStats(max_in_flight=max(started))


def _run(depth: int) -> tuple[list[str], EngineCore]:
    recorder: Any = Recorder(3)
    core = EngineCore(recorder, recorder, depth)
    while core.has_work:
        core.step()
    return recorder.log, core


def _step(i: int) -> list[str]:
    return [f"forward {i}", f"sample {i}"]


def _done(i: int) -> list[str]:
    return [f"wait {i}", f"commit {i}"]


def test_depth_one_finishes_each_step_before_the_next() -> None:
    log, core = _run(1)
    assert log == [line for i in range(3) for line in _step(i) + _done(i)]
    assert core.stats().max_in_flight == 1
    assert core.stats().compilations == {"triton": 0}


def test_depth_two_starts_the_next_step_before_it_waits() -> None:
    log, core = _run(2)
    assert log == _step(0) + _step(1) + _done(0) + _step(2) + _done(1) + _done(2)
    assert core.stats().max_in_flight == 2


def test_stuck_requests_are_a_bug_not_a_busy_loop() -> None:
    recorder: Any = Recorder(0)
    recorder.open = 1
    with pytest.raises(AssertionError, match="nothing runs"):
        EngineCore(recorder, recorder, 2).step()


@pytest.mark.parametrize("call", [lambda core: core.call("no_such_thing", [])])
def test_unknown_utility_is_named(call: Callable[[EngineCore], object]) -> None:
    recorder: Any = Recorder(0)
    with pytest.raises(LookupError, match="no_such_thing"):
        call(EngineCore(recorder, recorder, 1))
