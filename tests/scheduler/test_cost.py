# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from llmserve.config.cache import CacheConfig
from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.kv_spec import FullAttentionSpec
from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmserve.kv_cache.groups import make_kv_cache_config
from llmserve.kv_cache.manager import Hit
from llmserve.scheduler.cost import StepCosts
from llmserve.scheduler.scheduler import Scheduler

PROMPT = 32_768
ALONE = 1.3e-3  # seconds of a step of decodes
TOKEN = 2.5e-6  # seconds of a prompt's token, without attention
CONTEXT = 1 / 3840  # of that, for each token that it looks at


class Machine:
    """Runs plans on a clock of its own; 5 % of noise, and a step in two hundred is held up."""

    def __init__(self, costs: bool, most: float | None = None, believed: float = CONTEXT) -> None:
        self.now = self.done = 0.0
        self.rng = random.Random(1)
        length = PROMPT + 1024
        kv = make_kv_cache_config([FullAttentionSpec(1, 8, 2)], 16, 2**30, 4000)
        self.scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=8192),
            CacheConfig(), kv, max_model_len=length, logits_width=100, eos_token_ids=[],
            seed=0, max_in_flight=2,
            costs=StepCosts(most, believed, clock=lambda: self.now) if costs else None,
        )  # fmt: skip
        self.in_flight: deque[tuple[SchedulerOutput, float]] = deque()
        self.took: list[tuple[int, float]] = []  # prompt tokens of a step, its seconds

    def send(self, wire_id: int, length: int, max_tokens: int) -> None:
        ids = np.random.default_rng(wire_id).integers(0, 99, length, dtype=np.int32)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.scheduler.add(EngineRequest(
            client=0, request_id=wire_id, prompt=ids.tobytes(), params=params, arrival=0.0
        ))  # fmt: skip

    def seconds(self, plan: SchedulerOutput) -> float:
        counts, starts = plan.num_scheduled.astype(float), plan.num_computed
        prompts = counts[counts > 1] * (1 + CONTEXT * (starts + counts / 2)[counts > 1])
        noise = self.rng.uniform(0.95, 1.05) * (1.3 if self.rng.random() < 0.005 else 1)
        return (ALONE + TOKEN * prompts.sum()) * noise

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.done = max(self.done, self.now) + self.seconds(plan)
            self.in_flight.append((plan, self.done))
        if plan is None or len(self.in_flight) == 2:
            oldest, done = self.in_flight.popleft()
            tokens = int(oldest.num_scheduled[oldest.num_scheduled > 1].sum())
            self.took.append((tokens, done - self.now))
            self.now = done
            ids = np.zeros((oldest.num_rows, 1), np.int32)
            self.scheduler.commit(oldest, ModelRunnerOutput(ids, oldest.sample.astype(np.int32)))
            self.scheduler.take_outputs()

    def prefill(self) -> list[tuple[int, float]]:
        """Steps while a long prompt is computed beside eight that decode."""
        for wire_id in range(8):
            self.send(wire_id, 200, 1000)
        for _ in range(40):
            self.step()
        self.send(8, PROMPT, 1)
        self.took.clear()
        while len(self.scheduler.requests) > 8:
            self.step()
        return self.took[1:]  # one was in flight


@pytest.mark.parametrize("believed", [CONTEXT / 2, CONTEXT, 2 * CONTEXT])
def test_a_long_prompt_holds_up_no_decode(believed: float) -> None:
    held_up = [seconds for _, seconds in Machine(costs=False).prefill()]
    steps = Machine(costs=True, believed=believed).prefill()
    seconds = [seconds for _, seconds in steps]
    assert np.percentile(held_up, 99) > 20 * ALONE
    assert np.percentile(seconds, 99) < 3 * ALONE
    assert sum(tokens for tokens, _ in steps) >= PROMPT
    # of the time two fifths are the decodes' own, and a bit more goes by caution
    assert sum(seconds) < 2.2 * sum(held_up)


def test_who_has_no_room_is_not_looked_up_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, lookups = Machine(costs=True), 0
    for wire_id in range(8):
        machine.send(wire_id, 200, 1000)
    for _ in range(40):
        machine.step()
    machine.send(8, PROMPT, 1)
    machine.send(9, PROMPT, 1)
    lookup = machine.scheduler.kv.lookup

    def counted(request: Request) -> Hit:
        nonlocal lookups
        lookups += 1
        return lookup(request)

    monkeypatch.setattr(machine.scheduler.kv, "lookup", counted)
    steps = 0
    while len(machine.scheduler.requests) == 10:
        machine.step()
        steps += 1
    assert steps > 50 and lookups < 10


def test_the_limit_is_kept_in_milliseconds() -> None:
    seconds = [seconds for _, seconds in Machine(costs=True, most=0.01).prefill()]
    assert 0.005 < np.median(seconds) < 0.0105 and np.percentile(seconds, 99) < 0.013


def test_a_prompt_gets_on_where_nothing_fits() -> None:
    steps = Machine(costs=True, most=ALONE / 2).prefill()
    assert {tokens for tokens, _ in steps[:-1]} == {64}


def test_prompts_alone_are_not_split() -> None:
    machine = Machine(costs=True)
    for wire_id in range(3):
        machine.send(wire_id, 8192, 1)
        while machine.scheduler.has_unfinished():
            machine.step()
    assert [tokens for tokens, _ in machine.took if tokens] == [8192] * 3


def test_weight_and_what_fits_are_inverse() -> None:
    rng = random.Random(3)
    for _ in range(200):
        costs = StepCosts(None, rng.choice((0, 1e-5, CONTEXT, 0.1)))
        start, count = rng.randrange(100_000), rng.randrange(1, 10_000)
        summed = sum(1 + costs._context_cost * (start + i + 0.5) for i in range(count))
        assert costs.weight(start, count) == pytest.approx(summed)
        assert costs.fit(start, costs.weight(start, count) * (1 + 1e-9)) == count
        assert costs.fit(start, 0) == 0


def test_stalls_say_nothing_and_small_prompts_little() -> None:
    costs = StepCosts(None, 0)
    assert costs.fit(0, costs.room(4)) > 1 << 30
    for seconds in [0.001] * 8 + [5.0] * 7:
        costs.observe(4, 0, seconds)
    assert costs.fit(0, costs.room(4)) > 1 << 30  # of prompts nothing is known yet
    for seconds in [0.002, 9.0, 0.002, 7.0, 0.002]:
        costs.observe(4, 1000, seconds)
    assert costs.room(4) == pytest.approx(1500) == costs.room(7)
    costs.observe(0, 10, 1.0)
    assert costs.room(4) == pytest.approx(1500)
    for _ in range(9):
        costs.observe(4, 100, 0.001)  # they rode along for nothing
    assert costs.room(4) == pytest.approx(1500)
    fresh = StepCosts(None, 0)
    for _ in range(9):
        fresh.observe(4, 0, 0.001)
        fresh.observe(4, 200, 0.001)
    assert fresh.room(4) == 800


def test_a_time_that_does_not_grow_with_the_tokens_is_told_from_theirs() -> None:
    costs, rng = StepCosts(None, 0), random.Random(2)
    for _ in range(30):
        costs.observe(4, 0, 0.001 * rng.uniform(0.95, 1.05))
    for _ in range(60):
        weight = rng.choice((150, 600))
        costs.observe(4, weight, (0.001 + 0.0005 + 1e-6 * weight) * rng.uniform(0.99, 1.01))
    assert costs.room(4) == pytest.approx(1000, rel=0.15)  # 1.5 ms less 0.5 ms
    assert StepCosts(0.01, 0).room(4) > 1 << 30
    for _ in range(60):
        weight = rng.choice((150, 600))
        costs.observe(4, weight, (0.001 + 0.005 + 1e-6 * weight) * rng.uniform(0.99, 1.01))
    assert costs.room(4) == 2400  # two thirds of 6 ms, but four times what was tried


def _fixed(step: int) -> tuple[float, float]:
    return 4e-3, 1.0


def _slow_start(step: int) -> tuple[float, float]:
    return 0.0, 10.0 if step < 12 else 1.0


def _bimodal(step: int) -> tuple[float, float]:
    return 0.0, random.Random(step).choice((1.0, 3.0))


class Whimsical(Machine):
    """`whim` gives the seconds of a step that prompts take whatever their length, and by how much
    the step is slower than it should be; a row of decodes adds `row` seconds."""

    def __init__(self, whim: Callable[[int], tuple[float, float]], row: float, costs: bool) -> None:
        super().__init__(costs)
        self.whim, self.row, self.num_steps = whim, row, 0

    def seconds(self, plan: SchedulerOutput) -> float:
        self.num_steps += 1
        fixed, slower = self.whim(self.num_steps)
        prompts = plan.num_scheduled > 1
        rows = self.row * np.count_nonzero(~prompts)
        return (super().seconds(plan) + rows + fixed * prompts.any()) * slower


@pytest.mark.parametrize("row", [0.0, 1.6e-4])
@pytest.mark.parametrize("whim", [_fixed, _slow_start, _bimodal])
@pytest.mark.parametrize(("length", "max_tokens"), [(1000, 1), (1000, 60), (50, 20)])
def test_a_queue_behind_one_decode_gets_on(
    length: int, max_tokens: int, whim: Callable[[int], tuple[float, float]], row: float
) -> None:
    seconds = []
    for costs in (False, True):
        machine = Whimsical(whim, row, costs)
        machine.send(0, 200, 800)
        for _ in range(40):
            machine.step()
        began = machine.now
        for wire_id in range(1, 201):
            machine.send(wire_id, length, max_tokens)
        while len(machine.scheduler.requests) > 1:
            machine.step()
        seconds.append(machine.now - began)
    unlimited, limited = seconds
    assert limited < 2.5 * unlimited
