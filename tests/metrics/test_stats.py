# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is counted of requests."""

import bisect
import random
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from llmserve.core.messages import SchedulerStats
from llmserve.metrics.stats import (
    FINISH_REASONS,
    Histogram,
    RequestStats,
    ThroughputLog,
    kv_cache_usage,
    one_two_five,
)


def timings(**changes: Any) -> Any:
    fields = {
        "arrival": 100.0,
        "num_prompt_tokens": 10,
        "max_tokens": 50,
        "n": 2,
        "queue_time": 1.0,
        "first_token": 103.0,
        "last_token": 107.0,
        "finish": 108.0,
        "num_cached_tokens": 4,
        "num_generation_tokens": 5,
        "num_preemptions": 1,
        "finish_reason": "stop",
    }
    return SimpleNamespace(**(fields | changes))


def stats(source: SchedulerStats | None = None) -> RequestStats:
    return RequestStats(1000, lambda: source or SchedulerStats())


def test_one_two_five() -> None:
    assert one_two_five(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(99)[-1] == 50
    assert one_two_five(0) == []


def test_histogram_counts_as_prometheus_does() -> None:
    bounds = sorted(random.sample(range(1, 1000), 20))
    ours = Histogram(bounds)
    reference = Reference("x", "x", buckets=bounds, registry=CollectorRegistry())
    for _ in range(500):
        value = random.choice([*bounds, random.uniform(-5, 1200)])
        ours.observe(value)
        reference.observe(value)
    (family,) = reference.collect()
    buckets = [s.value for s in family.samples if s.name == "x_bucket"]
    running = 0.0
    for count, bucket in zip(ours.counts, buckets, strict=True):
        running += count
        assert running == bucket
    assert ours.total == pytest.approx(next(s.value for s in family.samples if s.name == "x_sum"))


def seen(histogram: Histogram, value: float, times: int = 1) -> bool:
    """Whether the histogram holds `value`, `times` times, and nothing else."""
    counts = [0] * len(histogram.counts)
    counts[bisect.bisect_left(histogram.bounds, value)] = times
    return list(histogram.counts) == counts and histogram.total == pytest.approx(value * times)


def test_a_request_from_arrival_to_finish() -> None:
    made = stats()
    request = timings(num_generation_tokens=1)
    made.on_arrival(request)
    made.on_arrival(timings())  # its second continuation
    made.on_first_token(request)
    made.on_tokens(request, 4, 2.0)
    made.on_finish(timings())
    assert (made.num_prompt_tokens, made.num_cached_tokens, made.num_generation_tokens) == (
        10,
        4,
        5,
    )
    assert made.finished == dict.fromkeys(FINISH_REASONS, 0) | {"stop": 1}
    for histogram, value in (
        (made.n, 2),
        (made.first_token_s, 3),
        (made.e2e_s, 8),
        (made.queue_s, 1),
        (made.prefill_s, 2),
        (made.decode_s, 4),
        (made.inference_s, 6),
        (made.token_s, 1),
        (made.prompt_tokens, 10),
        (made.generation_tokens, 5),
        (made.max_generation_tokens, 5),
        (made.max_tokens, 50),
        (made.preemptions, 1),
        (made.computed_prompt_tokens, 6),
    ):
        assert seen(histogram, value)
    assert seen(made.inter_token_s, 0.5, 4)


def test_an_abort_in_the_queue_has_no_phases() -> None:
    made = stats()
    made.on_finish(
        timings(queue_time=None, first_token=None, last_token=None, finish_reason="abort")
    )
    assert (
        made.finished["abort"] == 1 == sum(made.finished.values()) and made.num_prompt_tokens == 0
    )
    for histogram in (made.queue_s, made.prefill_s, made.decode_s, made.inference_s, made.token_s):
        assert sum(histogram.counts) == 0


def test_a_scored_prompt_counts_its_tokens() -> None:
    made = stats()
    made.on_finish(timings(first_token=None, last_token=None, finish_reason="length"))
    assert made.num_prompt_tokens == 10


def test_one_token_has_no_time_between_tokens() -> None:
    made = stats()
    made.on_finish(timings(last_token=103.0, num_generation_tokens=1))
    assert sum(made.token_s.counts) == 0 and sum(made.decode_s.counts) == 1


def test_steps_are_counted_once_however_many_tokens_they_had() -> None:
    source = SchedulerStats(num_steps=1, num_tokens_computed=10)
    made = stats(source)
    for _ in range(3):
        made.on_step()
    assert seen(made.step_tokens, 10)
    source.num_steps, source.num_tokens_computed = 4, 40
    made.on_step()
    assert sum(made.step_tokens.counts) == 4 and made.step_tokens.total == 40


def test_kv_cache_usage() -> None:
    assert kv_cache_usage(SchedulerStats()) == 0
    usage = SchedulerStats(num_blocks_total=100, num_blocks_free=50, num_blocks_cached=25)
    assert kv_cache_usage(usage) == 0.25


def test_the_line_is_vllms_and_silent_when_idle() -> None:
    made = stats()
    log = ThroughputLog(lambda: made, 0.0)
    assert log.line(SchedulerStats(), 10.0) is None
    request = timings(num_prompt_tokens=100, num_generation_tokens=50)
    made.on_first_token(request)
    busy = SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_blocks_total=100,
        num_blocks_free=75,
        prefix_queries=100,
        prefix_hits=40,
    )
    assert log.line(busy, 20.0) == (
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, "
        "Avg generation throughput: 5.0 tokens/s, Running: 3 reqs, Waiting: 2 reqs, "
        "GPU KV cache usage: 25.0%, Prefix cache hit rate: 40.0%"
    )
    idle = SchedulerStats(prefix_queries=100, prefix_hits=40)
    last = log.line(idle, 30.0)
    assert last is not None and "throughput: 0.0 tokens/s" in last and "Running: 0" in last
    assert log.line(idle, 40.0) is None
    anew = log.line(SchedulerStats(num_running=1, prefix_queries=10, prefix_hits=9), 50.0)
    assert anew is not None and "hit rate: 90.0%" in anew
