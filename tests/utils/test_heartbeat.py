# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import stat
import time
from pathlib import Path

import pytest

from llmserve.utils import heartbeat
from llmserve.utils.heartbeat import Heartbeat, Watchdog
from tests.helpers.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


@pytest.fixture
def pair(tmp_path: Path, clock: Clock) -> tuple[Heartbeat, Heartbeat]:
    """Who writes and who reads."""
    path = tmp_path / "beat"
    reader, writer = Heartbeat(str(path)), Heartbeat(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return writer, reader


def test_before_the_first_sign_nothing_is_late(
    pair: tuple[Heartbeat, Heartbeat], clock: Clock
) -> None:
    clock.now += 1e6
    assert (pair[1].age, pair[1].num_steps, pair[1].busy_since) == (0.0, 0, 0.0)
    assert not pair[1].late(1.0)


def test_an_idle_loop_is_late_once_it_says_nothing(
    pair: tuple[Heartbeat, Heartbeat], clock: Clock
) -> None:
    writer, reader = pair
    writer.step(2000)
    writer.idle()
    assert reader.busy_since == 0.0
    clock.now += 4.9
    assert not reader.late(5.0)
    clock.now += 0.2
    assert reader.late(5.0) and reader.age == pytest.approx(5.1)
    writer.idle()
    assert not reader.late(5.0)


def test_a_step_of_many_tokens_may_take_longer(
    pair: tuple[Heartbeat, Heartbeat], clock: Clock
) -> None:
    writer, reader = pair
    writer.idle()
    for _ in range(500):
        writer.step(4)
        clock.now += 0.02  # 5 ms a token
    assert reader.num_steps == 500
    assert reader.busy_since == 1000.0
    writer.step(4)
    clock.now += 5.5
    assert reader.late(5.0)
    for _ in range(500):
        writer.step(4)
        clock.now += 0.02
    writer.step(2000)
    clock.now += 20.0  # twice what the pace says
    assert not reader.late(5.0)
    clock.now += 40.0
    assert reader.late(5.0)


def test_the_first_step_has_time_before_any_pace_is_known(
    pair: tuple[Heartbeat, Heartbeat], clock: Clock
) -> None:
    writer, reader = pair
    writer.step(512)
    clock.now += 100.0
    assert not reader.late(5.0)
    clock.now += 100.0
    assert reader.late(5.0)


def test_a_step_is_not_blamed_for_the_one_that_it_was_planned_beside(
    pair: tuple[Heartbeat, Heartbeat], clock: Clock
) -> None:
    writer, reader = pair
    for _ in range(300):
        for tokens, seconds in ((8192, 0.002), (8, 0.5), (8, 0.002)):  # those of the one before
            writer.step(tokens)
            clock.now += seconds
    writer.step(8192)
    clock.now += 20.0
    assert reader.late(5.0)


def test_time_without_looks_is_a_second_at_most(clock: Clock) -> None:
    dog = Watchdog()
    assert dog.quiet(7.0) == 0.0
    clock.now += 0.25
    assert dog.quiet(7.0) == 0.25
    clock.now += 1e6
    assert dog.quiet(7.0) == 1.25
    clock.now += 1.0
    assert dog.quiet(8.0) == 0.0


def test_real_time(tmp_path: Path) -> None:
    beat = Heartbeat(str(tmp_path / "beat"))
    beat.idle()
    time.sleep(0.02)
    assert 0.01 < beat.age < 5.0 and not beat.late(5.0) and beat.late(0.001)
