# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import itertools
import time
from typing import Any

import pytest
import torch

from llmserve.worker.step_clock import StepClock
from tests.helpers.tiny_runner import Driver, random_prompt


class Device:
    """Runs steps in turn: each is enqueued at a time of the host's, and takes its own."""

    def __init__(self, clock: StepClock) -> None:
        self.now = self.free = 0.0

        class Event:
            def record(event: Any) -> None:  # noqa: N805
                self.free = max(self.free, self.now)
                event.time = self.free

            def synchronize(event: Any) -> None:  # noqa: N805
                self.now = max(self.now, event.time)

            def elapsed_time(event: Any, end: Any) -> float:  # noqa: N805
                return 1e3 * (end.time - event.time)

        clock._new = Event

    def run(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds


def test_a_step_in_flight_is_not_charged_with_the_launch_of_the_next() -> None:
    """By the host's clock a short step lasts until the long launches behind it are done."""
    clock = StepClock(torch.device("cpu"))
    device = Device(clock)
    before, seconds, seen = None, [], [0.0]
    for launch, work in ((0.2, 1.0), (0.1, 1.0), (4.5, 2.0), (0.1, 1.0), (4.5, 2.0), (0.1, 1.0)):
        clock.begin()
        device.now += launch
        device.run(work)
        if launch > work:
            device.free = device.now + 0.5  # its last kernel comes when the host is done
        step = clock.end()
        if before is not None:
            seconds.append(before.wait())
            seen.append(device.now)
        before = step
    assert before is not None
    seconds.append(before.wait())
    assert seconds == pytest.approx([1.2, 1.0, 4.0, 1.0, 4.0, 1.0])
    by_host = [after - before for before, after in itertools.pairwise(seen)]
    assert by_host == pytest.approx([1.2, 4.5, 0.5, 4.5, 0.5])


def test_what_comes_after_a_pause_counts_from_its_own_beginning() -> None:
    clock = StepClock(torch.device("cpu"))
    device = Device(clock)
    for pause in (0.0, 7.0, 3.0):
        device.now += pause
        clock.begin()
        device.run(1.0)
        assert clock.end().wait() == pytest.approx(1.0)


def test_a_runner_tells_what_its_steps_take() -> None:
    driver = Driver()
    slot = driver.add(1, random_prompt(40, 0))
    for count in (40, 1, 1):
        time.sleep(0.05)
        began = time.perf_counter()
        driver.step({slot: count})
        assert 0 < driver.output.seconds <= time.perf_counter() - began


@pytest.mark.gpu
def test_gpu_times_by_the_device() -> None:
    """Three steps in flight, for all of which the host is late: none takes the host's time."""
    clock, results = StepClock(torch.device("cuda")), []
    busy = torch.zeros(4096, 4096, device="cuda")
    for _ in range(3):
        clock.begin()
        for _ in range(20):
            busy @ busy
        results.append(clock.end())
    time.sleep(0.5)
    seconds = [result.wait() for result in results]
    assert all(0 < s < 0.4 for s in seconds), seconds
    assert clock.last is None
