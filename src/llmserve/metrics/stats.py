# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Counters and histograms of requests, and the line about throughput.

RequestStats is called for every token, so it keeps plain numbers, in memory that it is given;
prometheus.py reads them when somebody asks. Bucket bounds are those that vLLM publishes, so that
its dashboards fit.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from llmserve.core.messages import SchedulerStats

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_N = (1, 2, 5, 10, 20)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
# Where a number is in the memory: three sums, how requests ended, the last step seen, tool parsers,
# histograms.
_PROMPT, _CACHED, _GENERATED, _FINISHED = range(4)
_STEP, _STEP_TOKENS_SEEN = 8, 9
_PARSED = 10  # choices that a tool parser read: whole and streamed, without and with a call
_FIRST_HISTOGRAM, _HISTOGRAM_CELLS = 16, 48
NUM_CELLS = 800


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    bounds: list[int] = []
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > most:
                return bounds
            bounds.append(factor * power)
        power *= 10


def new_cells(count: int) -> "memoryview[float]":
    """Zeros of our own: `count` float64."""
    return memoryview(bytearray(8 * count)).cast("d")


class Histogram:
    """`counts[i]` observations in (bounds[i - 1], bounds[i]]; the last count has no upper bound.
    They are in `cells`, after the sum of what was observed."""

    __slots__ = ("_cells", "bounds", "counts")

    def __init__(self, bounds: Sequence[float], cells: "memoryview[float] | None" = None) -> None:
        self.bounds = bounds
        self._cells = new_cells(len(bounds) + 2) if cells is None else cells
        self.counts = self._cells[1 : len(bounds) + 2]

    @property
    def total(self) -> float:
        """The sum of what was observed."""
        return float(self._cells[0])

    def observe(self, value: float, times: int = 1) -> None:
        """`value` was seen `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self._cells[0] += value * times


class Timings(Protocol):
    """One engine request; frontend's RequestTimings. Times are time.monotonic() seconds."""

    arrival: float
    num_prompt_tokens: int
    max_tokens: int | None
    n: int
    queue_time: float | None
    first_token: float | None
    last_token: float | None
    finish: float | None
    num_cached_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    finish_reason: str | None


class RequestStats:
    """What was observed of requests since the start; the frontend's RequestObserver.

    It counts in `cells`, NUM_CELLS of them, which may be shared. Of several servers one follows the
    engine's steps, which all of them hear of.
    """

    def __init__(
        self,
        max_model_len: int,
        source: Callable[[], SchedulerStats],
        cells: "memoryview[float] | None" = None,
        *,
        follows_steps: bool = True,
    ) -> None:
        self._cells = new_cells(NUM_CELLS) if cells is None else cells
        self._num_histograms = 0
        tokens = one_two_five(max_model_len)
        self.first_token_s = self._histogram(_FIRST_TOKEN_S)
        self.inter_token_s = self._histogram(_TOKEN_S)
        self.token_s = self._histogram(_TOKEN_S)
        self.e2e_s = self._histogram(_REQUEST_S)
        self.queue_s = self._histogram(_REQUEST_S)
        self.prefill_s = self._histogram(_REQUEST_S)
        self.decode_s = self._histogram(_REQUEST_S)
        self.inference_s = self._histogram(_REQUEST_S)
        self.prompt_tokens = self._histogram(tokens)
        self.generation_tokens = self._histogram(tokens)
        self.max_generation_tokens = self._histogram(tokens)
        self.max_tokens = self._histogram(tokens)
        self.n = self._histogram(_N)
        self.step_tokens = self._histogram(_STEP_TOKENS)
        self.preemptions = self._histogram(_PREEMPTIONS)
        self.computed_prompt_tokens = self._histogram(tokens)
        self._source = source
        self._follows_steps = follows_steps
        self._last_arrival: float | None = None

    def _histogram(self, bounds: Sequence[float]) -> Histogram:
        begin = _FIRST_HISTOGRAM + self._num_histograms * _HISTOGRAM_CELLS
        assert len(bounds) + 2 <= _HISTOGRAM_CELLS and begin + _HISTOGRAM_CELLS <= len(self._cells)
        self._num_histograms += 1
        return Histogram(bounds, self._cells[begin : begin + _HISTOGRAM_CELLS])

    @property
    def num_prompt_tokens(self) -> int:
        """Of all requests that had a first token, or were only scored."""
        return int(self._cells[_PROMPT])

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that a cache had."""
        return int(self._cells[_CACHED])

    @property
    def num_generation_tokens(self) -> int:
        """Of all requests."""
        return int(self._cells[_GENERATED])

    @property
    def finished(self) -> dict[str, int]:
        """Requests that ended, by FINISH_REASONS."""
        return {r: int(self._cells[_FINISHED + i]) for i, r in enumerate(FINISH_REASONS)}

    @property
    def tool_parses(self) -> dict[tuple[str, str], int]:
        """Choices that a tool parser read, by vLLM's labels `mode` and `outcome`."""
        return {
            (mode, outcome): int(self._cells[_PARSED + 2 * i + j])
            for i, mode in enumerate(("non_streaming", "streaming"))
            for j, outcome in enumerate(("no_tool_call", "tool_call"))
        }

    def on_tool_parse(self, is_stream: bool, has_call: bool) -> None:
        """A tool parser read a choice to its end."""
        self._cells[_PARSED + 2 * is_stream + has_call] += 1

    def on_arrival(self, timings: Timings) -> None:
        """Sent to the engine. Continuations of one request come in a row and share `arrival`."""
        if timings.arrival != self._last_arrival:
            self._last_arrival = timings.arrival
            self.n.observe(timings.n)

    def on_first_token(self, timings: Timings) -> None:
        """`first_token`, `queue_time` and `num_cached_tokens` are set."""
        assert timings.first_token is not None
        self.first_token_s.observe(timings.first_token - timings.arrival)
        self._cells[_GENERATED] += timings.num_generation_tokens
        self._count_prompt(timings)

    def on_tokens(self, timings: Timings, count: int, seconds: float) -> None:
        """`count` more tokens, `seconds` after the ones before."""
        self._cells[_GENERATED] += count
        self.inter_token_s.observe(seconds / count, count)

    def on_finish(self, timings: Timings) -> None:
        """The end, whatever its reason."""
        assert timings.finish is not None
        reason = timings.finish_reason or "abort"
        self._cells[_FINISHED + FINISH_REASONS.index(reason)] += 1
        self.e2e_s.observe(timings.finish - timings.arrival)
        self.prompt_tokens.observe(timings.num_prompt_tokens)
        self.generation_tokens.observe(timings.num_generation_tokens)
        self.max_generation_tokens.observe(timings.num_generation_tokens)
        self.preemptions.observe(timings.num_preemptions)
        if timings.max_tokens is not None:
            self.max_tokens.observe(timings.max_tokens)
        if timings.queue_time is not None:
            self.queue_s.observe(timings.queue_time)
        if timings.first_token is not None:
            self._observe_phases(timings, timings.first_token)
        elif reason in ("stop", "length"):  # a prompt that was only scored
            self._count_prompt(timings)

    def _observe_phases(self, timings: Timings, first: float) -> None:
        last = first if timings.last_token is None else timings.last_token
        scheduled = timings.arrival + (timings.queue_time or 0.0)
        self.prefill_s.observe(first - scheduled)
        self.decode_s.observe(last - first)
        self.inference_s.observe(last - scheduled)
        self.computed_prompt_tokens.observe(timings.num_prompt_tokens - timings.num_cached_tokens)
        if timings.num_generation_tokens > 1:
            self.token_s.observe((last - first) / (timings.num_generation_tokens - 1))

    def _count_prompt(self, timings: Timings) -> None:
        self._cells[_PROMPT] += timings.num_prompt_tokens
        self._cells[_CACHED] += timings.num_cached_tokens

    def on_step(self) -> None:
        """The engine's news were looked at: counts its steps since the last look."""
        cells, stats = self._cells, self._source()
        if not self._follows_steps or stats.num_steps == cells[_STEP]:
            return
        if stats.num_steps < cells[_STEP]:  # another engine counts anew
            cells[_STEP] = cells[_STEP_TOKENS_SEEN] = 0
        steps = int(stats.num_steps - cells[_STEP])
        if steps:
            tokens = stats.num_tokens_computed - cells[_STEP_TOKENS_SEEN]
            self.step_tokens.observe(tokens / steps, steps)
        cells[_STEP], cells[_STEP_TOKENS_SEEN] = stats.num_steps, stats.num_tokens_computed


def kv_cache_usage(stats: SchedulerStats) -> float:
    """Share of the KV blocks that running requests hold, 0 to 1."""
    free = stats.num_blocks_free + stats.num_blocks_cached
    return 1 - free / stats.num_blocks_total if stats.num_blocks_total else 0.0


class ThroughputLog:
    """The periodic line. Rates and the hit rate are those since the line before."""

    def __init__(self, requests: Callable[[], RequestStats], now: float) -> None:
        self._requests = requests
        self._time = now
        self._prompt = 0
        self._generation = 0
        self._queries = 0
        self._hits = 0
        self._was_busy = False

    def line(self, stats: SchedulerStats, now: float) -> str | None:
        """None where nothing happened, in this interval and in the one before."""
        seconds = max(now - self._time, 1e-9)
        requests = self._requests()
        prompt = (requests.num_prompt_tokens - self._prompt) / seconds
        generation = (requests.num_generation_tokens - self._generation) / seconds
        queries = stats.prefix_queries - self._queries
        hits = stats.prefix_hits - self._hits
        if queries < 0:  # another engine counts anew
            queries, hits = stats.prefix_queries, stats.prefix_hits
        self._time = now
        self._prompt = requests.num_prompt_tokens
        self._generation = requests.num_generation_tokens
        self._queries, self._hits = stats.prefix_queries, stats.prefix_hits
        busy = bool(prompt or generation or stats.num_running or stats.num_waiting)
        silent = not busy and not self._was_busy
        self._was_busy = busy
        if silent:
            return None
        return (
            f"Engine 000: Avg prompt throughput: {prompt:.1f} tokens/s, "
            f"Avg generation throughput: {generation:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {kv_cache_usage(stats) * 100:.1f}%, "
            f"Prefix cache hit rate: {100 * hits / queries if queries else 0.0:.1f}%"
        )
