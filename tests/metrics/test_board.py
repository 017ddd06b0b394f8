# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What several servers show each other."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.core.messages import SchedulerStats
from llmserve.metrics import board as module
from llmserve.metrics.board import (
    EDGE,
    ENDED,
    PLACES,
    READY,
    REQUESTS,
    RESTARTS,
    RUNNING,
    Board,
)
from llmserve.metrics.edge import REASONS, EdgeStats
from llmserve.metrics.prometheus import EngineHealth, MetricsPage
from llmserve.metrics.stats import NUM_CELLS, RequestStats
from tests.helpers.api import model_info
from tests.helpers.clock import Clock
from tests.metrics.test_stats import timings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def pair(tmp_path: Path, clock: Clock) -> tuple[Board, Board]:
    path = str(tmp_path / "board")
    return Board(path, 0, 2), Board(path, 1, 2)


def test_sums_are_of_all_and_what_a_lost_server_had_is_given_back(
    pair: tuple[Board, Board], tmp_path: Path
) -> None:
    one, two = pair
    one.move(0, 3)
    two.move(0, 2)
    two.move(1, 1)
    two.set(RUNNING, 3)
    two.beat()
    two.count(ENDED)
    one.count(ENDED)
    for board in pair:
        assert (board.places(0), board.places(1), board.sum(PLACES)) == (5, 1, 6)
        assert board.total(ENDED) == 2
    supervisor = Board(str(tmp_path / "board"), num_keys=2)
    assert supervisor.sign(1) and not supervisor.sign(0)
    supervisor.replace(1)
    assert (one.places(0), one.places(1), one.sum(PLACES), one.sum(RUNNING)) == (3, 0, 3, 0)
    assert (one.total(ENDED), one.total(RESTARTS)) == (2, 1)
    assert not supervisor.sign(1)


def test_whose_turn_it_is(pair: tuple[Board, Board], clock: Clock) -> None:
    one, two = pair
    assert one.accepts(5, False)  # nobody else is there
    one.beat()
    two.beat()
    assert one.num_fresh() == 2
    assert one.accepts(5, False) and two.accepts(0, False)  # nobody is ready: one must refuse
    one.set(READY, 1)
    assert not two.accepts(0, False) and not two.accepts(0, True)  # the other one is
    two.set(READY, 1)
    assert two.accepts(5, False)  # as many as the other has
    assert not two.accepts(6, False)
    assert two.accepts(6, True)  # but nobody took it
    assert one.accepts(5, False)
    clock.now += 2.0  # the other is stuck
    two.beat()
    assert two.accepts(9, False)
    assert two.num_fresh() == 1


def test_any_page_is_the_sum_of_all(pair: tuple[Board, Board]) -> None:
    steps = SchedulerStats(num_steps=3, num_tokens_computed=30, num_running=1)
    texts = []
    pages = [MetricsPage(board) for board in pair]
    for index, (board, page) in enumerate(zip(pair, pages, strict=True)):
        board.beat()
        requests = RequestStats(
            100, lambda: steps, board.counters(REQUESTS), follows_steps=index == 0
        )
        for _ in range(1 + index):
            requests.on_first_token(timings())
            requests.on_finish(timings())
            requests.on_step()
        page.edge.refuse("queue_full")
        page.edge.dropped_frames = lambda: 4
        page.edge.publish()
        page.add_engine(
            "m",
            model_info(),
            lambda: steps,
            lambda board=board: RequestStats(100, lambda: steps, board.totals(REQUESTS)),  # type: ignore[misc]
            lambda: EngineHealth(0, 0.0),
        )
    for page in pages:
        text = page.render().decode()
        texts.append(text)
        values = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert values["vllm:request_success_total", "0", "m", "stop"] == 3
        assert values["vllm:time_to_first_token_seconds_count", "0", "m"] == 3
        assert values["vllm:e2e_request_latency_seconds_sum", "0", "m"] == 24
        assert values["vllm:iteration_tokens_total_count", "0", "m"] == 3  # steps: seen by both
        assert values["vllm:num_requests_running", "0", "m"] == 1
        assert values["llmserve:refused_total", "queue_full"] == 2
        assert values["llmserve:api_dropped_frames_total",] == 8
        assert "process_" not in text  # of which of them?
    assert texts[0] == texts[1]


def test_dropped_frames_never_fall(pair: tuple[Board, Board]) -> None:
    first, second = EdgeStats(pair[0]), EdgeStats(pair[0])  # one takes the place of the other
    dropped = 3
    first.dropped_frames = lambda: dropped
    first.publish()
    second.dropped_frames = lambda: dropped
    dropped = 2
    second.publish()
    dropped = 4
    second.publish()
    assert pair[1].totals(EDGE)[0] == 7


def test_sections_hold_what_is_counted() -> None:
    board = Board()
    assert len(board.counters(REQUESTS)) >= NUM_CELLS
    assert len(board.counters(EDGE)) > len(REASONS)
    assert "process_cpu_seconds_total" in MetricsPage(board).render().decode()
