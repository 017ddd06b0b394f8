# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The page that Prometheus reads: vLLM's names and labels, and our own under `llmserve:`."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llmserve.core.messages import COMPILATION_KINDS, ModelInfo, SchedulerStats
from llmserve.metrics.board import Board
from llmserve.metrics.edge import EdgeStats
from llmserve.metrics.stats import Histogram, RequestStats, kv_cache_usage

_LABELS = ["model_name", "engine"]
_ENGINE = "0"

_Number = Callable[[SchedulerStats], float]
_GAUGES: list[tuple[str, str, _Number]] = [
    ("vllm:num_requests_running", "Requests that hold KV blocks.", lambda s: s.num_running),
    ("vllm:num_requests_waiting", "Requests in the queue.", lambda s: s.num_waiting),
    ("llmserve:waiting_tokens", "Prompt tokens in the queue.", lambda s: s.num_waiting_tokens),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", kv_cache_usage),
    ("llmserve:max_steps_in_flight", "Most steps in flight at once.", lambda s: s.max_in_flight),
]
_COUNTERS: list[tuple[str, str, _Number]] = [
    ("vllm:num_preemptions", "Requests taken out of the batch.", lambda s: s.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up.", lambda s: s.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found.", lambda s: s.prefix_hits),
    ("vllm:corrupted_requests", "Requests with logits not finite.", lambda s: s.num_corrupted),
    ("llmserve:engine_steps", "Steps of the engine.", lambda s: s.num_steps),
    ("llmserve:tokens_computed", "Tokens run through the model.", lambda s: s.num_tokens_computed),
    (
        "llmserve:chunked_prefills",
        "Prompts that took more than one step.",
        lambda s: s.num_chunked_prefills,
    ),
    (
        "llmserve:wasted_tokens",
        "Tokens sampled after a stop that was seen one step late.",
        lambda s: s.num_wasted_tokens,
    ),
    (
        "llmserve:late_results",
        "Results of rows that were aborted or preempted meanwhile.",
        lambda s: s.num_late_results,
    ),
    (
        "llmserve:dropped_events",
        "Aborts and results for requests that nobody knows.",
        lambda s: s.num_dropped_events,
    ),
    ("llmserve:expired", "Requests whose deadline passed.", lambda s: s.num_expired),
    (
        "llmserve:dropped_frames",
        "Messages to the engine that were none.",
        lambda s: s.num_dropped_frames,
    ),
]
_HISTOGRAMS: list[tuple[str, str, Callable[[RequestStats], Histogram]]] = [
    (
        "vllm:time_to_first_token_seconds",
        "Arrival to the first token.",
        lambda r: r.first_token_s,
    ),
    (
        "vllm:inter_token_latency_seconds",
        "Between tokens of one request.",
        lambda r: r.inter_token_s,
    ),
    (
        "vllm:request_time_per_output_token_seconds",
        "Mean time between tokens, once a request.",
        lambda r: r.token_s,
    ),
    ("vllm:e2e_request_latency_seconds", "Arrival to the end.", lambda r: r.e2e_s),
    ("vllm:request_queue_time_seconds", "Arrival to the first schedule.", lambda r: r.queue_s),
    (
        "vllm:request_prefill_time_seconds",
        "First schedule to the first token.",
        lambda r: r.prefill_s,
    ),
    ("vllm:request_decode_time_seconds", "First to last token.", lambda r: r.decode_s),
    (
        "vllm:request_inference_time_seconds",
        "First schedule to the last token.",
        lambda r: r.inference_s,
    ),
    ("vllm:request_prompt_tokens", "Prompt tokens of a request.", lambda r: r.prompt_tokens),
    (
        "vllm:request_generation_tokens",
        "Generated tokens of a request.",
        lambda r: r.generation_tokens,
    ),
    (
        "vllm:request_max_num_generation_tokens",
        "Most generated tokens of a continuation.",
        lambda r: r.max_generation_tokens,
    ),
    ("vllm:request_params_max_tokens", "max_tokens of a request.", lambda r: r.max_tokens),
    ("vllm:request_params_n", "n of a request.", lambda r: r.n),
    ("vllm:iteration_tokens_total", "Tokens of one step.", lambda r: r.step_tokens),
    ("vllm:request_num_preemptions", "Preemptions of a request.", lambda r: r.preemptions),
    (
        "vllm:request_prefill_kv_computed_tokens",
        "Prompt tokens of a request that no cache had.",
        lambda r: r.computed_prompt_tokens,
    ),
]


# Reasons of edge.py, and the flags that vLLM names in their place
_QUEUE_LIMITS = {"queue_full": "max_num_queued_reqs", "queue_tokens": "max_num_queued_tokens"}


class EngineHealth(NamedTuple):
    """How often the engine was restarted, and the seconds since its step loop's last sign."""

    num_restarts: int
    heartbeat_age: float


class EngineCollector(Collector):
    """Families of one engine, read at the time of the scrape."""

    def __init__(
        self,
        name: str,
        model: ModelInfo,
        stats: Callable[[], SchedulerStats],
        requests: Callable[[], RequestStats],
        health: Callable[[], EngineHealth],
        refused: Callable[[], dict[str, int]],
    ) -> None:
        self._health = health
        self._refused = refused
        self._labels = [name, _ENGINE]
        self._cache_config = model.cache_config
        self._stats = stats
        self._requests = requests

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats = self._stats()
        for name, help, number in _GAUGES:
            yield self._gauge(name, help, [((), number(stats))])
        used = stats.num_blocks_total - stats.num_blocks_free - stats.num_blocks_cached
        yield self._gauge(
            "llmserve:kv_blocks",
            "KV blocks: free, cached (free, but a prefix hit may revive them), used.",
            [
                (("free",), stats.num_blocks_free),
                (("cached",), stats.num_blocks_cached),
                (("used",), used),
            ],
            "state",
        )
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue, by what they wait for.",
            [
                (("capacity",), stats.num_waiting - stats.num_held),
                (("deferred",), stats.num_held),
            ],
            "reason",
        )
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "How the KV cache was configured.",
            labels=[*self._cache_config, "engine"],
        )
        info.add_metric([*self._cache_config.values(), _ENGINE], 1)
        yield info
        for name, help, number in _COUNTERS:
            yield self._counter(name, help, [((), number(stats))])
        yield self._counter(
            "llmserve:compilations",
            "Kernels compiled, or loaded from a cache, since the engine was ready.",
            [((kind,), stats.compilations.get(kind, 0)) for kind in COMPILATION_KINDS],
            "kind",
        )
        health = self._health()
        yield self._counter(
            "llmserve:engine_restarts", "Engines that were lost.", [((), health.num_restarts)]
        )
        yield self._gauge(
            "llmserve:engine_heartbeat_age_seconds",
            "Since the step loop last showed that it gets on; an idle one does every second.",
            [((), health.heartbeat_age)],
        )
        seen = self._requests()
        yield from self._request_counters(seen)
        rejections = CounterMetricFamily(
            "vllm:admission_rejections",
            "Requests for which the queue had no room, by the limit.",
            labels=["model_name", "reason"],
        )
        refused = self._refused()
        for reason, limit in _QUEUE_LIMITS.items():
            rejections.add_metric([self._labels[0], limit], refused[reason])
        yield rejections
        parses = CounterMetricFamily(
            "vllm:tool_call_parser_invocations",
            "Choices that a tool parser read, one each, streamed or not.",
            labels=["model_name", "mode", "outcome", "request_type"],
        )
        for (mode, outcome), count in seen.tool_parses.items():
            parses.add_metric([self._labels[0], mode, outcome, "chat_completions"], count)
        yield parses
        for name, help, histogram in _HISTOGRAMS:
            yield self._histogram(name, help, histogram(seen))

    def _request_counters(self, seen: RequestStats) -> Iterator[Metric]:
        cached = seen.num_cached_tokens
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", [((), seen.num_prompt_tokens)])
        yield self._counter(
            "vllm:prompt_tokens_cached", "Prompt tokens that a cache had.", [((), cached)]
        )
        yield self._counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from.",
            [
                (("local_compute",), seen.num_prompt_tokens - cached),
                (("local_cache_hit",), cached),
            ],
            "source",
        )
        yield self._counter(
            "vllm:generation_tokens", "Generated tokens.", [((), seen.num_generation_tokens)]
        )
        yield self._counter(
            "vllm:request_success",
            "Requests that ended, by how.",
            [((reason,), count) for reason, count in seen.finished.items()],
            "finished_reason",
        )

    def _gauge(
        self, name: str, help: str, rows: Iterable[tuple[tuple[str, ...], float]], *extra: str
    ) -> Metric:
        family = GaugeMetricFamily(name, help, labels=[*_LABELS, *extra])
        for values, number in rows:
            family.add_metric([*self._labels, *values], number)
        return family

    def _counter(
        self, name: str, help: str, rows: Iterable[tuple[tuple[str, ...], float]], *extra: str
    ) -> Metric:
        family = CounterMetricFamily(name, help, labels=[*_LABELS, *extra])
        for values, number in rows:
            family.add_metric([*self._labels, *values], number)
        return family

    def _histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, help, labels=_LABELS)
        bounds = [_le(bound) for bound in histogram.bounds] + ["+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(self._labels, buckets, histogram.total)
        return family


def _le(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


class _ProcessFigures(Collector):
    """Of this process; of several servers each has its own, which no page can tell apart."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """All families, where this server is the only one."""
        if self._board.num_fresh() <= 1:
            yield from self._process.collect()


class MetricsPage:
    """A registry of its own: process figures at once, an engine's once it is there. Counters and
    histograms are the sums over all servers on the board."""

    content_type: str = CONTENT_TYPE_LATEST

    def __init__(self, board: Board) -> None:
        self._registry = CollectorRegistry()
        self.edge = EdgeStats(board)
        self._registry.register(self.edge)
        self._registry.register(_ProcessFigures(board))
        PlatformCollector(registry=self._registry)

    def add_engine(
        self,
        name: str,
        model: ModelInfo,
        stats: Callable[[], SchedulerStats],
        requests: Callable[[], RequestStats],
        health: Callable[[], EngineHealth],
    ) -> None:
        """`name` is the label model_name; `stats`, `requests` and `health` give the latest."""
        self._registry.register(
            EngineCollector(name, model, stats, requests, health, lambda: self.edge.refused)
        )

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)
