# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The page: its names, labels and buckets are the ones that dashboards ask for."""

from prometheus_client.parser import text_string_to_metric_families

from llmserve.core.messages import SchedulerStats
from llmserve.metrics.board import Board
from llmserve.metrics.prometheus import EngineHealth, MetricsPage
from llmserve.metrics.stats import FINISH_REASONS, RequestStats
from tests.helpers.api import model_info
from tests.metrics.test_stats import timings

STATS = SchedulerStats(
    num_running=3,
    num_waiting=3,
    num_held=1,
    num_blocks_total=100,
    num_blocks_free=60,
    num_blocks_cached=15,
    prefix_queries=50,
    prefix_hits=20,
    num_preemptions=4,
    num_corrupted=1,
    num_steps=7,
    num_tokens_computed=700,
    compilations={"triton": 2},
)
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "llmserve:waiting_tokens",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "llmserve:kv_blocks",
    "llmserve:max_steps_in_flight",
    "llmserve:engine_heartbeat_age_seconds",
}
COUNTERS = {
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:corrupted_requests",
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:prompt_tokens_by_source",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:admission_rejections",
    "vllm:tool_call_parser_invocations",
    "llmserve:engine_steps",
    "llmserve:tokens_computed",
    "llmserve:chunked_prefills",
    "llmserve:wasted_tokens",
    "llmserve:late_results",
    "llmserve:dropped_events",
    "llmserve:engine_restarts",
    "llmserve:dropped_frames",
    "llmserve:expired",
    "llmserve:compilations",
}
OF_SERVERS = {"vllm:admission_rejections", "vllm:tool_call_parser_invocations"}
FIRST = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
FIRST += " 160.0 640.0 2560.0"
TOKEN = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5 5.0 7.5 10.0 20.0 40.0 80.0"
REQUEST = "0.3 0.5 0.8 1.0 1.5 2.0 2.5 5.0 10.0 15.0 20.0 30.0 40.0 50.0 60.0 120.0 240.0 480.0"
REQUEST += " 960.0 1920.0 7680.0"
TOKENS = "1.0 2.0 5.0 10.0 20.0 50.0 100.0 200.0"
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": FIRST,
    "vllm:inter_token_latency_seconds": TOKEN,
    "vllm:request_time_per_output_token_seconds": TOKEN,
    "vllm:e2e_request_latency_seconds": REQUEST,
    "vllm:request_queue_time_seconds": REQUEST,
    "vllm:request_prefill_time_seconds": REQUEST,
    "vllm:request_decode_time_seconds": REQUEST,
    "vllm:request_inference_time_seconds": REQUEST,
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:request_params_n": "1.0 2.0 5.0 10.0 20.0",
    "vllm:iteration_tokens_total": (
        "1.0 8.0 16.0 32.0 64.0 128.0 256.0 512.0 1024.0 2048.0 4096.0 8192.0 16384.0"
    ),
    "vllm:request_num_preemptions": "1.0 2.0 3.0 4.0 5.0 10.0 20.0",
    "vllm:request_prefill_kv_computed_tokens": TOKENS,
}


def page(max_model_len: int = 256) -> tuple[str, RequestStats]:
    requests = RequestStats(max_model_len, lambda: STATS)
    first = timings(
        arrival=0.0, first_token=0.03, num_prompt_tokens=100, num_cached_tokens=30,
        num_generation_tokens=9,
    )  # fmt: skip
    requests.on_first_token(first)
    for _ in range(5):
        requests.on_finish(timings(first_token=None, num_prompt_tokens=0, num_cached_tokens=0))
    for is_stream, has_call in ((False, True), (True, True), (True, True), (True, False)):
        requests.on_tool_parse(is_stream, has_call)
    made = MetricsPage(Board())
    made.edge.refuse("queue_tokens")
    health = EngineHealth(2, 0.5)
    made.add_engine("m", model_info(), lambda: STATS, lambda: requests, lambda: health)
    return made.render().decode(), requests


def test_names_kinds_and_labels_equal_the_list() -> None:
    families = {f.name: f for f in text_string_to_metric_families(page()[0])}
    ours = {name: f for name, f in families.items() if name.startswith(("vllm:", "llmserve:"))}
    for name in ("llmserve:refused", "llmserve:api_dropped_frames", "llmserve:api_server_restarts"):
        del ours[name]  # of the server, not of an engine: tests/metrics/test_edge.py
    kinds = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    kinds |= dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: f.type for name, f in ours.items()} == kinds
    for name, family in ours.items():
        for sample in family.samples:
            if name != "vllm:cache_config_info":
                assert sample.labels["model_name"] == "m"
            if name not in OF_SERVERS:
                assert sample.labels["engine"] == "0"
            if name in COUNTERS:
                assert sample.name == name + "_total"


def test_buckets_are_byte_equal() -> None:
    text, _ = page()
    for name, bounds in HISTOGRAMS.items():
        lines = [line for line in text.splitlines() if line.startswith(name + "_bucket")]
        les = [line.split('le="')[1].split('"')[0] for line in lines]
        assert les == [*bounds.split(), "+Inf"], name
    assert 'le="1e+06"' in page(2_000_000)[0]


def value(text: str, sample_name: str, **labels: str) -> float:
    (found,) = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    ]
    return found


def test_values() -> None:
    text, _ = page()
    for name, labels, expected in (
        ("vllm:num_requests_running", {}, 3),
        ("vllm:num_requests_waiting", {}, 3),
        ("vllm:num_requests_waiting_by_reason", {"reason": "capacity"}, 2),
        ("vllm:num_requests_waiting_by_reason", {"reason": "deferred"}, 1),
        ("vllm:kv_cache_usage_perc", {}, 0.25),
        ("llmserve:kv_blocks", {"state": "free"}, 60),
        ("llmserve:kv_blocks", {"state": "cached"}, 15),
        ("llmserve:kv_blocks", {"state": "used"}, 25),
        ("llmserve:engine_restarts_total", {}, 2),
        ("llmserve:engine_heartbeat_age_seconds", {}, 0.5),
        ("vllm:prefix_cache_queries_total", {}, 50),
        ("vllm:prefix_cache_hits_total", {}, 20),
        ("llmserve:compilations_total", {"kind": "triton"}, 2),
        ("llmserve:compilations_total", {"kind": "flashinfer"}, 0),
        ("vllm:num_preemptions_total", {}, 4),
        ("vllm:corrupted_requests_total", {}, 1),
        ("vllm:prompt_tokens_total", {}, 100),
        ("vllm:prompt_tokens_cached_total", {}, 30),
        ("vllm:prompt_tokens_by_source_total", {"source": "local_compute"}, 70),
        ("vllm:prompt_tokens_by_source_total", {"source": "local_cache_hit"}, 30),
        ("vllm:generation_tokens_total", {}, 9),
        ("vllm:request_success_total", {"finished_reason": "stop"}, 5),
        ("vllm:request_success_total", {"finished_reason": "error"}, 0),
        ("vllm:admission_rejections_total", {"reason": "max_num_queued_reqs"}, 0),
        ("vllm:admission_rejections_total", {"reason": "max_num_queued_tokens"}, 1),
        *(
            (
                "vllm:tool_call_parser_invocations_total",
                {"mode": mode, "outcome": outcome, "request_type": "chat_completions"},
                count,
            )
            for mode, outcome, count in (
                ("non_streaming", "no_tool_call", 0),
                ("non_streaming", "tool_call", 1),
                ("streaming", "no_tool_call", 1),
                ("streaming", "tool_call", 2),
            )
        ),
        ("llmserve:engine_steps_total", {}, 7),
        ("llmserve:tokens_computed_total", {}, 700),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "0.02"}, 0),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "0.04"}, 1),
        ("vllm:time_to_first_token_seconds_count", {}, 1),
        ("vllm:time_to_first_token_seconds_sum", {}, 0.03),
        ("vllm:cache_config_info", {"block_size": "16", "num_gpu_blocks": "256"}, 1),
    ):
        assert value(text, name, **labels) == expected, name
    assert len(FINISH_REASONS) == 5


def test_pages_do_not_share_a_registry() -> None:
    assert "vllm:" not in MetricsPage(Board()).render().decode()
    assert page()[0].count("# TYPE vllm:num_requests_running ") == 1
