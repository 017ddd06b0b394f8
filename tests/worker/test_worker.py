# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A worker from config to its first steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmserve.errors import ConfigError
from llmserve.executor.base import ModelFacts
from llmserve.kernels import cpu
from llmserve.kernels.compilations import compilations
from llmserve.kernels.cpu import library_id
from llmserve.kernels.paged_attention import num_splits
from llmserve.worker import worker as worker_module
from llmserve.worker.memory import free_memory
from llmserve.worker.worker import Worker, bytes_between, launch_sizes, run_dummy
from tests.helpers.tiny_runner import VOCABULARY, describe_tiny
from tests.helpers.tiny_worker import plan_of, tiny_config, tiny_kv

torch.set_num_threads(1)


def test_load_facts() -> None:
    worker = Worker(tiny_config(), describe_tiny())
    facts = ModelFacts(**worker.load())
    assert (facts.architecture, facts.logits_width) == ("LlamaForCausalLM", VOCABULARY)
    assert len(facts.kv_specs) == 3
    assert facts.weight_bytes == worker.model.weight_bytes > 200_000
    assert facts.kv_bytes_available == 1 << 20
    assert facts.kernels == {"attention": "TorchAttention", "cpu": library_id()}


def test_facts_tell_which_kernels_a_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order are another fingerprint."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert library_id() == "torch"
    monkeypatch.setattr(cpu, "library", lambda: SimpleNamespace(_name="/a/cpu_decode-1f.so"))
    assert library_id() == "cpu_decode-1f"


def test_kv_bytes_beyond_the_free_memory_are_refused() -> None:
    worker = Worker(tiny_config(kv_cache_memory_bytes=100 << 40), describe_tiny())
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes 109951162777600 is more than"):
        worker.load()


def test_kv_bytes_without_a_flag() -> None:
    """A quarter of the free memory, 4 GiB at most."""
    worker = Worker(tiny_config(kv_cache_memory_bytes=None), describe_tiny())
    available = worker.load()["kv_bytes_available"]
    assert available == pytest.approx(min(4 << 30, free_memory() // 4), rel=0.1)


def test_initialize_leaves_the_pool_as_it_was() -> None:
    """Warm-up writes to the padding block alone."""
    worker = Worker(tiny_config(), describe_tiny())
    kv_config = tiny_kv(ModelFacts(**worker.load()))
    worker.initialize_kv_cache(kv_config, 128)
    caches = [cache for cache, _, _ in worker.runner._layers]
    assert all(cache[0].any() and not cache[1:].any() for cache in caches)


def test_sizes_of_launches_have_every_form_of_a_kernel() -> None:
    for max_rows in (1, 3, 32, 257):
        sizes = launch_sizes(max_rows, 100)
        decodes = [len(counts) for counts in sizes if set(counts) == {1}]
        assert max(decodes) == max_rows
        for heads, keys, sms in ((1, 100, 132), (8, 4096, 132), (4, 32768, 188)):

            def splits(rows: int, of: tuple[int, ...] = (heads, keys, sms)) -> int:
                return num_splits(rows, *of)

            warmed = {splits(rows) for rows in (1, *decodes)}
            assert warmed == {splits(rows) for rows in range(1, max_rows + 1)}
        assert [counts for counts in sizes if counts[0] > 1] == [[17], [33], [65]]


def test_bytes_of_graphs_that_are_not_captured_for_the_profile() -> None:
    each = worker_module._GRAPH_BYTES
    assert bytes_between([1], [], 4, 100, 10) == bytes_between([1, 9], [16, 64], 4, 100, 10) == 0
    assert bytes_between([1, 2, 4, 9], [], 9, 100, 10) == 6 * 110 + 2 * each
    assert bytes_between([1], [16, 32, 64], 9, 100, 10) == 32 * 100 + 9 * 10 + each


@pytest.mark.parametrize("mode", ["FULL", "NONE"])
def test_the_budget_is_shared_with_the_largest_step_and_graphs(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card of numbers made up here: 100 MB, of which others have 10."""
    worker = Worker(tiny_config(gpu_memory=60_000_000, cudagraph_mode=mode), describe_tiny())
    worker.load()
    free = 90_000_000
    steps, captured = [], []

    def capture(self: Any, *args: Any) -> None:
        nonlocal free
        captured.append(args)
        free -= 5_000_000

    def run(runner: Any, counts: list[int], slot: int) -> None:
        steps.append((counts, slot, runner.max_model_len))
        run_dummy(runner, counts, slot)

    for name, result in {
        "empty_cache": lambda: None, "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_reserved": lambda device: 20_000_000, "memory_reserved": lambda device: 0,
        "mem_get_info": lambda device: (free, 100_000_000),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, result)
    monkeypatch.setattr(worker_module.ModelRunner, "capture", capture)
    monkeypatch.setattr(worker_module, "run_dummy", run)
    available = worker._profile()
    assert steps == [([16] * 4, 1, 128)]
    if mode == "NONE":
        assert available == 60_000_000 - 20_000_000 - 10_000_000 and captured == []
        return
    assert captured == [("FULL", [1, 4], [16, 64], 4)]
    between = bytes_between([1, 2, 4], [16, 32, 64], 4, 48 * 4, 8 * 4)
    assert available == 60_000_000 - 20_000_000 - 10_000_000 - 5_000_000 - between
    worker.config = tiny_config(gpu_memory=30_000_000, cudagraph_mode=mode)
    with pytest.raises(ConfigError, match="--gpu-memory allows 0.03 GiB, but .* graphs 0.01 GiB"):
        worker._profile()


def test_counts_what_is_compiled_from_ready_on() -> None:
    worker = Worker(tiny_config(), describe_tiny())
    compilations().counts["triton"] += 3
    worker.initialize_kv_cache(tiny_kv(ModelFacts(**worker.load())), 128)
    assert worker.compilations() == {}
    compilations().counts["triton_load"] += 2
    assert worker.compilations() == {"triton_load": 2}


def test_largest_step_runs() -> None:
    worker = Worker(tiny_config(), describe_tiny())
    worker.initialize_kv_cache(tiny_kv(ModelFacts(**worker.load())), 128)
    run_dummy(worker.runner, [22, 21, 21])


def test_steps_out_of_order_are_our_bug() -> None:
    worker = Worker(tiny_config(), describe_tiny())
    worker.initialize_kv_cache(tiny_kv(ModelFacts(**worker.load())), 128)
    with pytest.raises(AssertionError, match="sample without its forward"):
        worker.sample(plan_of(1, 0, 1))


def test_backend_that_does_not_fit() -> None:
    worker = Worker(tiny_config(attention_backend="triton_paged"), describe_tiny())
    with pytest.raises(ConfigError, match="triton_paged has no support for the CPU"):
        worker.load()
