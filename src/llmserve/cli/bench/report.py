# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From single requests to vLLM's table and JSON keys."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
METRICS = tuple(_TITLES)


@dataclass
class Result:
    """One request. Times in seconds; `start` on the clock of `time.perf_counter`."""

    success: bool = False
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None where there is no second."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


def summarize(
    results: list[Result],
    duration: float,
    metrics: list[str],
    percentiles: list[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """The numbers under vLLM's names. `duration` in seconds, `goodput` limits in ms by metric."""
    good = [result for result in results if result.success]
    tokens_in = sum(result.prompt_tokens for result in good)
    tokens_out = sum(result.output_tokens for result in good)
    seconds: dict[str, list[float]] = {
        "ttft": [result.ttft for result in good],
        "tpot": [result.tpot for result in good if result.tpot is not None],
        "itl": [itl for result in good for itl in result.itls],
        "e2el": [result.latency for result in good],
    }
    peak_tokens, peak_requests = _peaks(good)
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / duration,
        "request_goodput": _good(good, goodput) / duration if goodput else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }
    for metric in metrics:
        values = np.array(seconds[metric] or [0.0]) * 1000
        summary[f"mean_{metric}_ms"] = float(values.mean())
        summary[f"median_{metric}_ms"] = float(np.median(values))
        summary[f"std_{metric}_ms"] = float(values.std())
        for percentile in percentiles:
            summary[f"p{percentile:g}_{metric}_ms"] = float(np.percentile(values, percentile))
    return summary


def details(results: list[Result]) -> dict[str, Any]:
    """The keys that only `--save-detailed` adds, one entry a request."""
    return {
        "input_lens": [result.prompt_tokens for result in results],
        "output_lens": [result.output_tokens for result in results],
        "ttfts": [result.ttft for result in results],
        "itls": [result.itls for result in results],
        "start_times": [result.start for result in results],
        "generated_texts": [result.text for result in results],
        "errors": [result.error for result in results],
    }


def _good(results: list[Result], limits: dict[str, float]) -> int:
    def keeps(result: Result) -> bool:
        values = {"ttft": result.ttft, "tpot": result.tpot or 0.0, "e2el": result.latency}
        return all(values[metric] * 1000 <= limit for metric, limit in limits.items())

    return sum(map(keeps, results))


def _peaks(results: list[Result]) -> tuple[float, int]:
    """Most output tokens in one second, and most requests at once."""
    if not results:
        return 0.0, 0
    origin = min(result.start for result in results)
    seconds: dict[int, float] = {}
    changes: list[tuple[float, int]] = []
    for result in results:
        changes += [(result.start, 1), (result.start + result.latency, -1)]
        arrivals = result.start - origin + result.ttft + np.cumsum([0.0, *result.itls])
        share = result.output_tokens / len(arrivals)  # a chunk may carry several tokens
        for arrival in arrivals:
            seconds[int(arrival)] = seconds.get(int(arrival), 0.0) + share
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return max(seconds.values()), most


def table(
    summary: dict[str, Any],
    metrics: list[str],
    percentiles: list[float],
    max_concurrency: int | None,
    request_rate: float,
) -> str:
    """vLLM's table, 50 columns wide."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]

    def row(label: str, value: float | int | None) -> None:
        if value is not None:
            text = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
            lines.append(f"{label:<40} {text}")

    row("Successful requests:", summary["completed"])
    row("Failed requests:", summary["failed"])
    row("Maximum request concurrency:", max_concurrency)
    row("Request rate configured (RPS):", None if np.isinf(request_rate) else float(request_rate))
    row("Benchmark duration (s):", summary["duration"])
    row("Total input tokens:", summary["total_input_tokens"])
    row("Total generated tokens:", summary["total_output_tokens"])
    row("Request throughput (req/s):", summary["request_throughput"])
    row("Request goodput (req/s):", summary["request_goodput"])
    row("Output token throughput (tok/s):", summary["output_throughput"])
    row("Peak output token throughput (tok/s):", float(summary["max_output_tokens_per_s"]))
    row("Peak concurrent requests:", float(summary["max_concurrent_requests"]))
    row("Total token throughput (tok/s):", summary["total_token_throughput"])
    for metric in metrics:
        short, title = _TITLES[metric]
        lines.append(f"{title:-^50}")
        row(f"Mean {short} (ms):", summary[f"mean_{metric}_ms"])
        row(f"Median {short} (ms):", summary[f"median_{metric}_ms"])
        for percentile in percentiles:
            row(f"P{percentile:g} {short} (ms):", summary[f"p{percentile:g}_{metric}_ms"])
    lines.append("=" * 50)
    return "\n".join(lines)
