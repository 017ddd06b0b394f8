# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmserve.core.messages import SchedulerStats
from llmserve.core.scheduler_output import LateMask
from llmserve.engine.core import EngineCore
from llmserve.structured_output.manager import GrammarRow


class Handle:
    def __init__(self, log: list[str], step: int) -> None:
        self.log, self.step = log, step

    def result(self) -> str:
        self.log.append(f"wait {self.step}")
        return f"tokens {self.step}"


class Masks:
    """A GrammarManager of which every plan from `first` on needs a mask of 3 rows, one bound."""

    def __init__(self, log: list[str], first: int = 0) -> None:
        self.log, self.first = log, first

    def rows_of(self, plan: Any, requests: Any) -> list[GrammarRow]:
        self.plan = plan
        request: Any = SimpleNamespace(finish_reason=None, key=plan)
        return [GrammarRow(1, request)]

    def binds(self, rows: list[GrammarRow], num_in_flight: int) -> bool:
        return self.plan >= self.first

    def mask(self, plan: Any, rows: list[GrammarRow]) -> list[Any]:
        self.log.append(f"mask {plan}")
        return []

    def fill(self, rows: dict[int, GrammarRow], words: np.ndarray) -> list[Any]:
        assert words[[0, 2]].tolist() == [[-1], [-1]] and list(rows) == [1]
        self.log.append(f"fill {rows[1].request.key}")
        words[1] = 5
        return []

    def advance(self, rows: list[GrammarRow], output: str) -> list[Any]:
        self.log.append(f"advance {output.split()[1]}")
        return []


class Recorder:
    """Scheduler and executor in one, writing down in which order the core uses them."""

    def __init__(self, num_plans: int) -> None:
        self.log: list[str] = []
        self.plans = list(range(num_plans))
        self.open = num_plans
        self.slots = SimpleNamespace(requests=[])
        self.can_be_late = False

    def late_mask(self, plan: int) -> LateMask | None:
        words = np.zeros((3, 1), np.int32)

        def release() -> None:
            assert words.tolist() == [[-1], [5], [-1]]
            self.log.append("release")

        return LateMask(words, release) if self.can_be_late else None

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


def _run_masked(depth: int, late: bool, first: int = 0) -> list[str]:
    recorder: Any = Recorder(3)
    recorder.can_be_late = late
    grammars: Any = Masks(recorder.log, first)
    core = EngineCore(recorder, recorder, depth, grammars)
    while core.has_work:
        core.step()
    log: list[str] = recorder.log
    return log


def _drawn(i: int) -> list[str]:
    return [f"wait {i}", f"advance {i}", f"commit {i}"]


def test_a_mask_needs_the_tokens_of_all_steps_before() -> None:
    log = _run_masked(2, late=False)
    masks = [[f"forward {i}", *(_drawn(i - 1) if i else []), f"mask {i}", f"sample {i}"]
             for i in range(3)]  # fmt: skip
    assert log == [line for lines in masks for line in lines] + _drawn(2)


@pytest.mark.parametrize("first", [0, 1])
def test_a_late_mask_follows_its_draw_and_comes_before_the_next_plan(first: int) -> None:
    """The device has the next step's forward before the host waits for anything."""
    late = [[f"fill {i}", "release"] if i >= first else [] for i in range(3)]
    assert _run_masked(2, late=True, first=first) == [
        *_step(0), *late[0], *_step(1), *_drawn(0), *late[1], *_step(2), *_drawn(1), *late[2],
        *_drawn(2),
    ]  # fmt: skip
    assert _run_masked(1, late=True, first=first) == [
        line for i in range(3) for line in [*_step(i), *late[i], *_drawn(i)]
    ]


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
