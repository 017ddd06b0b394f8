# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmserve.metrics import edge
from llmserve.metrics.board import Board
from llmserve.metrics.edge import REASONS, DrainRate
from llmserve.metrics.prometheus import MetricsPage


def test_all_reasons_are_series_from_the_start_and_no_other_ever_is() -> None:
    page = MetricsPage(Board())
    page.edge.dropped_frames = lambda: 7
    assert "llmserve:api_dropped_frames_total 7.0" in page.render().decode()
    for count in (0, 2):
        for _ in range(count):
            page.edge.refuse("queue_full")
        families = {f.name: f for f in text_string_to_metric_families(page.render().decode())}
        samples = {s.labels["reason"]: s.value for s in families["llmserve:refused"].samples}
        assert samples == dict.fromkeys(REASONS, 0.0) | {"queue_full": count}
    with pytest.raises(AssertionError):
        page.edge.refuse("whatever a client wrote")


def test_the_drain_time_follows_what_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(edge.time, "monotonic", lambda: now)
    ended = 0
    rate = DrainRate(lambda: ended)
    assert rate.seconds(1) == 60  # nothing has ended yet
    for _ in range(100):  # ten a second for ten seconds
        now += 0.1
        ended += 1
        rate.roll()
    assert rate.seconds(50) in (5, 6)
    assert rate.seconds(0) == 1
    assert rate.seconds(100_000) == 60
    now += 60.0
    rate.roll()
    assert rate.seconds(50) > 20  # what was long ago counts for little
