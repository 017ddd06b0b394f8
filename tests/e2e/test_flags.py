# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every flag does something: the test that sees it, here or elsewhere."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llmserve import LLM, SamplingParams
from llmserve.api import server as api_server
from llmserve.api.state import AppState
from llmserve.config.server import ServerConfig
from llmserve.errors import ConfigError, LLMServeError, RequestError
from llmserve.executor.uniproc import UniProcExecutor
from llmserve.frontend.output_processor import RequestTimings
from tests.helpers.api import ScriptedEngine, make_llm
from tests.helpers.engine import Engine
from tests.helpers.server import Server
from tests.helpers.tiny_models import write_tiny_model

_ROOT = Path(__file__).parents[2]
_RESOLVE = "tests/engine/test_resolve.py::"
_SOURCE = "tests/config/test_source.py::"
_ORACLES = "tests/e2e/test_oracles.py::"
_PROCESSES = "tests/e2e/test_processes.py::"
_TOOLS = "tests/api/routes/chat/test_handler_tools.py::"
_ADMIN = "tests/api/test_admin.py::"
_MIDDLEWARE = "tests/api/test_middleware.py::"
_PROTOCOL = "tests/api/test_protocol.py::"
_HERE = "tests/e2e/test_flags.py::"
_LATE = "tests/api/test_state.py::test_an_engine_that_is_late_or_lost_takes_nothing_for_a_while"
_GRAPHS = "tests/worker/test_cuda_graph.py::"

SEEN_BY = {
    "CacheConfig.block_size": _HERE + "test_block_size",
    "CacheConfig.enable_prefix_caching": _HERE + "test_prefix_caching_off",
    "CacheConfig.gpu_memory": "tests/cli/test_plan.py::test_kv_budget",
    "CacheConfig.gpu_memory_utilization": "tests/cli/test_plan.py::test_kv_budget",
    "CacheConfig.kv_cache_dtype": _HERE + "test_what_has_one_value_refuses_others",
    "CacheConfig.kv_cache_memory_bytes": _HERE + "test_kv_cache_memory_bytes",
    "CacheConfig.num_gpu_blocks_override": _ORACLES + "test_preempted_equals_undisturbed",
    "DeviceConfig.attention_backend": "tests/worker/test_worker.py::test_backend_that_does_not_fit",
    "DeviceConfig.cpu_threads": _HERE + "test_cpu_threads",
    "DeviceConfig.cudagraph_capture_sizes": _GRAPHS + "test_decode_sizes_of_flags",
    "DeviceConfig.cudagraph_mode": _HERE + "test_graph_modes",
    "DeviceConfig.max_cudagraph_capture_size": _GRAPHS + "test_decode_sizes_of_flags",
    "DeviceConfig.device": "tests/e2e/test_bad_input.py::test_a_card_that_is_not_there",
    "DeviceConfig.enforce_eager": _HERE + "test_graph_modes",
    "DeviceConfig.tensor_parallel_size": _HERE + "test_what_has_one_value_refuses_others",
    "LoadConfig.download_dir": _SOURCE + "test_download_dir_and_dummy_weights",
    "LoadConfig.load_format": _HERE + "test_load_format",
    "ModelConfig.dtype": _RESOLVE + "test_dtype",
    "ModelConfig.generation_config": _HERE + "test_generation_defaults",
    "ModelConfig.hf_overrides": "tests/config/test_hf.py::test_overrides_reach_the_config",
    "ModelConfig.hf_token": _SOURCE + "test_gated_repository_needs_the_token",
    "ModelConfig.logits_processors": _HERE + "test_logits_processors",
    "ModelConfig.logprobs_mode": _HERE + "test_logprobs_mode",
    "ModelConfig.max_logprobs": _HERE + "test_max_logprobs_and_no_tokenizer",
    "ModelConfig.max_model_len": _HERE + "test_max_model_len",
    "ModelConfig.model": "tests/e2e/test_server.py::test_names",
    "ModelConfig.override_generation_config": _HERE + "test_generation_defaults",
    "ModelConfig.quantization": _HERE + "test_what_has_one_value_refuses_others",
    "ModelConfig.revision": _SOURCE + "test_hub_errors_are_one_line",
    "ModelConfig.seed": _HERE + "test_seed",
    "ModelConfig.served_model_name": _PROCESSES + "test_keys_names_and_prefix",
    "ModelConfig.skip_tokenizer_init": _HERE + "test_max_logprobs_and_no_tokenizer",
    "ModelConfig.structured_outputs_config": "tests/frontend/test_input_processor.py::"
    "test_structured_outputs_config",
    "ModelConfig.tokenizer": "tests/config/test_hf.py::test_tokenizer_elsewhere",
    "ModelConfig.trust_remote_code": _HERE + "test_what_has_one_value_refuses_others",
    "SchedulerConfig.async_scheduling": _ORACLES + "test_overlapped_equals_synchronous",
    "SchedulerConfig.enable_chunked_prefill": _ORACLES + "test_whole_prompts_where_chunking_is_off",
    "SchedulerConfig.long_prefill_token_threshold": _HERE + "test_long_prefill_token_threshold",
    "SchedulerConfig.max_inter_token_ms": _HERE + "test_max_inter_token_ms",
    "SchedulerConfig.max_num_batched_tokens": _ORACLES + "test_chunked_equals_whole",
    "SchedulerConfig.max_num_queued_reqs": "tests/scheduler/test_admission.py::"
    "test_a_full_queue_is_503",
    "SchedulerConfig.max_num_queued_tokens": "tests/scheduler/test_admission.py::"
    "test_a_full_queue_is_503",
    "SchedulerConfig.max_num_seqs": _HERE + "test_max_num_seqs",
    "SchedulerConfig.scheduling_policy": _ORACLES + "test_priority_goes_first",
    "ServerConfig.admin_socket": _ADMIN + "test_the_socket_is_the_owners_and_resets_the_cache",
    "ServerConfig.allowed_hosts": _MIDDLEWARE + "test_hosts",
    "ServerConfig.log_format": "tests/faults/test_logs.py::test_t47_logs",
    "ServerConfig.max_requests_per_key": _MIDDLEWARE + "test_a_key_has_its_share_of_places",
    "ServerConfig.prefix_cache_scope": _MIDDLEWARE + "test_cached_prefixes_go_by_key",
    "ServerConfig.read_timeout": _PROTOCOL + "test_a_request_that_does_not_arrive_is_408",
    "ServerConfig.request_timeout": _MIDDLEWARE + "test_the_engine_hears_of_the_nearer_deadline",
    "ServerConfig.write_timeout": _PROTOCOL
    + "test_who_stops_reading_is_cut_off_and_its_request_ends",
    "ServerConfig.api_hang_timeout": _PROCESSES + "test_lost_api_server",
    "ServerConfig.api_server_count": "tests/faults/test_api_servers.py::test_both_answer_as_one",
    "ServerConfig.allowed_origins": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.api_key": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.chat_template": _HERE + "test_server_flags",
    "ServerConfig.default_chat_template_kwargs": _HERE + "test_server_flags",
    "ServerConfig.disable_log_stats": _HERE + "test_disable_log_stats",
    "ServerConfig.disable_uvicorn_access_log": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.enable_force_include_usage": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.engine_hang_timeout": _LATE,
    "ServerConfig.engine_start_timeout": "tests/faults/test_engine_loss.py::test_never_ready",
    "ServerConfig.enable_log_requests": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.host": _HERE + "test_server_flags",
    "ServerConfig.max_request_bytes": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.port": _PROCESSES + "test_a_port_in_use_is_one_line",
    "ServerConfig.reasoning_field": _TOOLS + "test_a_flag_narrows_where_reasoning_is",
    "ServerConfig.reasoning_parser": _TOOLS + "test_flags_choose_the_parsers",
    "ServerConfig.response_role": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.root_path": _PROCESSES + "test_keys_names_and_prefix",
    "ServerConfig.shutdown_timeout": _PROCESSES + "test_a_drain_has_an_end",
    "ServerConfig.sse_keep_alive_interval": "tests/api/test_sse.py::"
    "test_a_silent_stream_gets_its_status_and_comments",
    "ServerConfig.stream_interval": _HERE + "test_server_flags",
    "ServerConfig.tool_call_parser": _TOOLS + "test_flags_choose_the_parsers",
    "ServerConfig.trust_request_chat_template": "tests/api/routes/chat/test_handler.py::"
    "test_a_clients_template_where_it_is_trusted",
    "ServerConfig.uds": _PROCESSES + "test_unix_socket_answers_503_until_the_model_is_there",
    "ServerConfig.uvicorn_log_level": _HERE + "test_server_flags",
}


def test_every_flag_has_a_test() -> None:
    lines = (_ROOT / "tests/house/flags.txt").read_text().splitlines()
    assert set(SEEN_BY) == {line for line in lines if line and not line.startswith("#")}
    for flag, node in SEEN_BY.items():
        file, _, name = node.partition("::")
        source = (_ROOT / file).read_text()
        body = re.search(rf"^(@.*\n|    .*\n|[\])].*\n)*(async )?def {name}\(", source, re.M)
        assert body, f"{flag}: there is no {node}"
        field = flag.partition(".")[2]
        names = rf"\b{field}\b|--(no-)?{field.replace('_', '-')}\b"
        if field != "model":  # the one that needs no name
            assert re.search(names, source), f"{file} never says {field}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama", seed=3)


@pytest.fixture
def engine(model: Path) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(**flags: Any) -> Engine:
        small = {"max_model_len": 256, "kv_cache_memory_bytes": 4 << 20}
        made.append(Engine(model, **(small | flags)))
        return made[-1]

    yield make
    for one in made:
        one.close()


PROMPT = [5 + n * 7 % 110 for n in range(60)]


def cached(engine: Engine) -> int | None:
    """Tokens of PROMPT that the second request finds."""
    engine.add(PROMPT)
    engine.run()
    second = engine.add(PROMPT)
    return engine.run()[second].num_cached_tokens


def test_block_size(engine: Callable[..., Engine]) -> None:
    sizes = {size: engine(block_size=size) for size in (8, 16, 32)}
    assert [one.info.block_size for one in sizes.values()] == [8, 16, 32]
    assert [cached(one) for one in sizes.values()] == [56, 48, 32]


def test_prefix_caching_off(engine: Callable[..., Engine]) -> None:
    assert cached(engine(enable_prefix_caching=False)) == 0


def test_kv_cache_memory_bytes(engine: Callable[..., Engine]) -> None:
    blocks = [
        engine(kv_cache_memory_bytes=n << 20).info.num_kv_blocks + 1 for n in (4, 8)
    ]  # fmt: skip
    assert blocks[1] == pytest.approx(2 * blocks[0], abs=1)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"quantization": "fp8"}, "--quantization"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
    ],
)
def test_what_has_one_value_refuses_others(
    engine: Callable[..., Engine], flags: dict[str, Any], name: str
) -> None:
    with pytest.raises(ConfigError, match=name):
        engine(**flags)


def test_cpu_threads(engine: Callable[..., Engine]) -> None:
    for count in (1, 3):
        executor: Any = engine(cpu_threads=count).core.executor
        assert executor._thread.submit(torch.get_num_threads).result() == count


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ({}, (True, True, False)),
        ({"cudagraph_mode": "FULL_DECODE_ONLY"}, (True, False, False)),
        ({"cudagraph_mode": "FULL_AND_PIECEWISE"}, (True, True, True)),
        ({"cudagraph_mode": "PIECEWISE"}, (False, False, True)),
        ({"cudagraph_mode": "NONE"}, (False, False, False)),
        ({"enforce_eager": True}, (False, False, False)),
    ],
)
def test_graph_modes(
    engine: Callable[..., Engine], flags: dict[str, Any], made: tuple[bool, bool, bool]
) -> None:
    """Whole decode steps, whole steps with prompts, pieces."""
    executor = engine(device="cuda", dtype="float16", **flags).core.executor
    assert isinstance(executor, UniProcExecutor)
    runner = executor.worker.runner
    graphs, pieces = runner.graphs, runner.pieces
    assert (bool(graphs and graphs._decode), bool(graphs and graphs._mixed), bool(pieces)) == made


def test_load_format(engine: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="gguf"):
        engine(load_format="gguf")
    dummy: Any = engine(load_format="dummy").core.executor
    weights = [p for p in dummy.worker.model.parameters() if p.ndim > 1]
    assert weights and all(0 < weight.abs().max() <= 1e-3 for weight in weights)


def test_generation_defaults(engine: Callable[..., Engine], model: Path) -> None:
    path = model / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps(own | {"temperature": 0.6, "top_k": 20, "do_sample": True}))
    over = {"temperature": 0.1}
    assert engine().info.generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert engine(generation_config="vllm").info.generation_defaults == {}
    changed = engine(override_generation_config=over).info.generation_defaults
    assert changed == {"temperature": 0.1, "top_k": 20}
    path.write_text(json.dumps(own))


def test_logits_processors(engine: Callable[..., Engine]) -> None:
    own = engine(logits_processors=["tests.sampling.test_base:NeverTwice"])
    free = engine().generate([PROMPT], max_tokens=32, logit_bias={9: 100.0})[0]
    (tokens,) = own.generate(
        [PROMPT], max_tokens=32, logit_bias={9: 100.0}, extra_args={"never_twice": True}
    )
    assert set(free) == {9}
    assert all(a != b for a, b in zip(tokens, tokens[1:], strict=False))


def test_logprobs_mode(engine: Callable[..., Engine]) -> None:
    values = {}
    for mode in ("raw_logprobs", "processed_logprobs"):
        one = engine(logprobs_mode=mode)
        request = one.add(PROMPT, max_tokens=1, logprobs=1, allowed_token_ids=[9])
        (extra,) = (e for e in one.run()[request].extras if e.logprobs)
        assert extra.logprobs is not None
        values[mode] = float(extra.logprobs.unpack()[1][0, 0])
    assert values["processed_logprobs"] == 0.0 > values["raw_logprobs"]


def test_max_logprobs_and_no_tokenizer(model: Path) -> None:
    flags = {"max_model_len": 128, "kv_cache_memory_bytes": 4 << 20, "cpu_threads": 1}
    with LLM(str(model), skip_tokenizer_init=True, max_logprobs=3, **flags) as llm:
        params = SamplingParams(max_tokens=2, logprobs=4, detokenize=False)
        with pytest.raises(RequestError, match="3"):
            llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
        params = SamplingParams(max_tokens=2, logprobs=3, detokenize=False, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 2
        with pytest.raises(LLMServeError, match="skip.tokenizer.init"):
            llm.generate("text", params, use_tqdm=False)


def test_max_model_len(engine: Callable[..., Engine]) -> None:
    short = engine(max_model_len=64)
    request = short.add(PROMPT, max_tokens=100)
    assert short.run()[request].finish_reason == "length"
    assert len(short.results[request].token_ids) == 64 - len(PROMPT)
    assert engine(max_model_len=-1, num_gpu_blocks_override=9).info.max_model_len < 256


def test_seed(engine: Callable[..., Engine]) -> None:
    prompts = [PROMPT, PROMPT[:9]]
    drawn = [
        engine(seed=seed).generate(prompts, temperature=1.0, max_tokens=32) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_long_prefill_token_threshold(engine: Callable[..., Engine]) -> None:
    chunked = engine(long_prefill_token_threshold=16)
    assert chunked.generate([PROMPT]) == engine().generate([PROMPT])
    assert chunked.core.stats().num_chunked_prefills == 1


def test_max_inter_token_ms(engine: Callable[..., Engine]) -> None:
    """Beside a decode a prompt of 200 tokens goes in pieces where no step is short enough."""
    prompt = [n % 90 + 5 for n in range(200)]
    answers, chunked = [], []
    for limit in (0, 1e-6):
        llm = engine(max_inter_token_ms=limit)
        first = llm.add(PROMPT, max_tokens=30, ignore_eos=True)
        for _ in range(8):
            llm.step()
        second = llm.add(prompt, max_tokens=4, ignore_eos=True)
        results = llm.run()
        answers.append([results[name].token_ids for name in (first, second)])
        chunked.append(llm.core.stats().num_chunked_prefills)
    assert answers[0] == answers[1] and chunked == [0, 1]


def test_max_num_seqs(engine: Callable[..., Engine]) -> None:
    narrow = engine(max_num_seqs=2)
    for n in range(5):
        narrow.add(PROMPT[n:])
    most = 0
    while narrow.core.has_work:
        narrow.step()
        most = max(most, narrow.core.stats().num_running)
    assert most == 2
    narrow.run()


@pytest.mark.parametrize("quiet", [True, False])
async def test_disable_log_stats(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api_server, "LOG_INTERVAL_S", 0.01)
    monkeypatch.setattr(api_server.logger, "propagate", True)
    caplog.set_level("INFO")
    state = AppState(ServerConfig(disable_log_stats=quiet))
    scripted = ScriptedEngine()
    llm = make_llm(scripted)

    async def connect() -> Any:
        return llm

    await api_server._start(state, connect)
    assert state.stats is not None
    state.stats.on_tokens(
        RequestTimings(arrival=0.0, num_prompt_tokens=1, max_tokens=9, n=1), 5, 0.1
    )
    await asyncio.sleep(0.1)
    assert ("Avg generation throughput" in caplog.text) != quiet
    if state.background is not None:
        state.background.cancel()
    llm.shutdown()
    scripted.close()


def test_server_flags(qwen3: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ word }}{% for m in messages %}{{ m.content }}{% endfor %}")
    flags = [
        "--max-model-len", "256", "--kv-cache-memory-bytes", "16MiB", "--cpu-threads", "1",
        "--chat-template", str(template), "--default-chat-template-kwargs", '{"word": "First "}',
        "--stream-interval", "8", "--uvicorn-log-level", "warning", "--host", "127.0.0.2",
    ]  # fmt: skip
    with Server(str(qwen3), *flags) as server:
        assert server.url.startswith("http://127.0.0.2:")
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url.replace("127.0.0.2", "127.0.0.1"))
        messages = [{"role": "user", "content": "then"}]
        rendered = server.post("/tokenize", messages=messages)["tokens"]
        plain = server.post("/tokenize", prompt="First then", add_special_tokens=False)["tokens"]
        assert rendered == plain
        body = {"prompt": "hi", "max_tokens": 32, "stream": True, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.text.count("data: ") <= 32 / 8 + 3
        assert "Started server process" not in server.text and "POST" not in server.text
        server.check_idle()
