# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math

import numpy as np
import pytest

from llmserve.cli.bench.report import Result, details, summarize, table

RESULTS = [
    Result(True, 0.0, 0.1, 1.1, [0.25] * 4, 10, 5, "a"),
    Result(True, 0.5, 0.3, 0.9, [0.3, 0.3], 20, 3, "b"),
    Result(True, 3.0, 0.2, 0.2, [], 30, 1, "c"),
    Result(False, 0.0, error="500"),
]


def test_numbers_by_hand() -> None:
    summary = summarize(RESULTS, 2.0, ["ttft", "tpot", "itl", "e2el"], [50, 99], {})
    wanted = {
        "completed": 3, "failed": 1, "duration": 2.0, "total_input_tokens": 60,
        "total_output_tokens": 9, "request_throughput": 1.5, "output_throughput": 4.5,
        "total_token_throughput": 34.5, "request_goodput": None, "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0, "mean_tpot_ms": 275.0, "mean_itl_ms": 1600 / 6,
        "median_itl_ms": 250.0, "mean_e2el_ms": 2200 / 3, "p50_e2el_ms": 900.0,
        "max_concurrent_requests": 2, "std_ttft_ms": float(np.std([100, 300, 200])),
        "p99_ttft_ms": float(np.percentile([100, 300, 200], 99)),
    }  # fmt: skip
    for key, value in wanted.items():
        assert summary[key] == (value if value is None else pytest.approx(value)), key
    # Second 0: tokens at 0.1, 0.35, 0.6, 0.85 of the first and 0.8 of the second request.
    assert summary["max_output_tokens_per_s"] == pytest.approx(5)


def test_goodput_counts_requests_within_all_limits() -> None:
    def goodput(**limits: float) -> float:
        value = summarize(RESULTS, 2.0, [], [], limits)["request_goodput"]
        assert isinstance(value, float)
        return value

    assert goodput(ttft=250) == 1.0
    assert goodput(ttft=250, e2el=500) == 0.5
    assert goodput(tpot=260) == 1.0


def test_table_is_vllms() -> None:
    metrics, percentiles = ["ttft", "tpot", "itl"], [99.0]
    summary = summarize(RESULTS, 2.0, metrics, percentiles, {"ttft": 250})
    lines = table(summary, metrics, percentiles, 8, 4.0).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    assert lines[1] == f"{'Successful requests:':<40} 3         "
    labels = [line[:40].strip() for line in lines]
    assert labels[1:14] == [
        "Successful requests:", "Failed requests:", "Maximum request concurrency:",
        "Request rate configured (RPS):", "Benchmark duration (s):", "Total input tokens:",
        "Total generated tokens:", "Request throughput (req/s):", "Request goodput (req/s):",
        "Output token throughput (tok/s):", "Peak output token throughput (tok/s):",
        "Peak concurrent requests:", "Total token throughput (tok/s):",
    ]  # fmt: skip
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert f"{'P99 ITL (ms):':<40} 300.00    " in lines
    assert "Request rate configured (RPS):" not in table(summary, metrics, percentiles, 8, math.inf)


def test_nothing_succeeded() -> None:
    summary = summarize([Result(error="x")], 1.0, ["ttft"], [99], {})
    assert summary["completed"] == 0 and summary["mean_ttft_ms"] == 0.0


def test_details_have_an_entry_for_each_request() -> None:
    assert {len(values) for values in details(RESULTS).values()} == {4}
    assert details(RESULTS)["errors"][3] == "500"
