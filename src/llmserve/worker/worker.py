# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A device with a model on it: loads, measures, allocates, runs."""

import dataclasses
import time
from typing import Any

import numpy as np
import torch

from llmserve.attention.registry import choose
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import LateMask, NewRequest, SchedulerOutput, TokenMask
from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import ConfigError
from llmserve.kernels.compilations import compilations
from llmserve.kernels.cpu import library_id, start_building
from llmserve.kernels.fused_linear import tables_id
from llmserve.kernels.triton_jit import card_of
from llmserve.kv_cache.groups import page_bytes, plan_groups
from llmserve.model_loader.loader import load_model
from llmserve.models.interfaces import CausalLM
from llmserve.models.registry import MODELS
from llmserve.sampling.sampler import Sampler
from llmserve.utils.logger import get_logger
from llmserve.worker.compile_ahead import CompileStart, StepCompilers
from llmserve.worker.cuda_graph import decode_sizes, mixed_sizes
from llmserve.worker.memory import free_memory
from llmserve.worker.model_runner import ModelRunner, StepResult

logger = get_logger(__name__)

_CPU_KV_BYTES = 4 << 30
_CPU_KV_SHARE = 0.25  # of the memory that is free once the weights are loaded
_PINNED = 12  # blocks of each size: four copies a step
_GRAPH_BYTES = 2 << 20  # of a captured step's kernels and their arguments, with its draws
# What takes the most memory beside the logits
_COSTLY = SamplingParams(top_p=0.9, presence_penalty=1.0, repetition_penalty=1.1, logprobs=5)
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


class Worker:
    """`config` is resolved: device, dtype, budgets. Methods are called from one thread, in the
    order load, initialize_kv_cache, then forward and sample by turns.
    """

    def __init__(self, config: EngineConfig, model: ModelDescription) -> None:
        self.config = config
        self.description = model
        self.device = torch.device(config.device.device)
        self.dtype: torch.dtype = DTYPES[config.model.dtype]
        self._model: CausalLM | None = None
        self._runner: ModelRunner | None = None

    @property
    def model(self) -> CausalLM:
        """The loaded model."""
        assert self._model is not None, "not loaded"
        return self._model

    @property
    def runner(self) -> ModelRunner:
        """What runs steps, once there is a KV cache."""
        assert self._runner is not None, "no KV cache"
        return self._runner

    def load(self) -> dict[str, Any]:
        """Loads the weights and measures; the fields of executor.base.ModelFacts."""
        if self.device.type == "cpu":
            start_building()
        description = self.description
        length = self.config.model.max_model_len
        if length is not None and 0 < length < description.max_model_len:
            description = dataclasses.replace(description, max_model_len=length)
        compilers = self._compile_ahead(description)
        model_class = MODELS.load(description.architecture)
        self._model = load_model(
            model_class, description, self.config.load, self.dtype, self.device
        )
        if compilers is not None:
            compilers.wait()
        kernels = {choose(s, self.dtype, self._family(), self.config.device.attention_backend)
                   for s in self.model.attention_shapes}  # fmt: skip
        return {
            "architecture": description.architecture,
            "logits_width": self.model.logits_width,
            "kv_specs": self.model.kv_specs,
            "weight_bytes": self.model.weight_bytes,
            "kv_bytes_available": self._kv_bytes_available(),
            "device": self.config.device.device,
            "dtype": self.config.model.dtype,
            "kernels": {"attention": ", ".join(sorted(kind.__name__ for kind in kernels))}
            | ({"tiles": tables_id()} if self.device.type == "cuda" else {})
            | ({"cpu": library_id()} if self.device.type == "cpu" else {}),
        }

    def _compile_ahead(self, description: ModelDescription) -> StepCompilers | None:
        card, rows = card_of(self.device), self.config.scheduler.max_num_seqs
        if card is None or rows is None:
            return None
        block_size, length = self.config.cache.block_size, description.max_model_len
        start = CompileStart(description, self.config.model.dtype, card, rows, length, block_size)
        return StepCompilers(start)

    def initialize_kv_cache(self, kv_config: KVCacheConfig, max_model_len: int) -> None:
        """Allocates the pool and runs one step of each kind. `max_model_len` is final by now."""
        self._runner = self._make_runner(kv_config, max_model_len)
        warm_up(self.runner, max_model_len)
        if self.device.type == "cuda":
            self._capture()
        elif not self.config.device.enforce_eager:
            assert self.config.scheduler.max_num_seqs
            self.runner.record(self.config.scheduler.max_num_seqs)
        compilations().watch()
        self._before_ready = dict(compilations().counts)

    def compilations(self) -> dict[str, int]:
        """What this process has compiled or loaded since `initialize_kv_cache`, by kind."""
        return compilations().since(self._before_ready)

    def _graph_sizes(self) -> tuple[list[int], list[int]] | None:
        """Rows of decode steps and tokens of others to capture, None where nothing is."""
        config, scheduler = self.config.device, self.config.scheduler
        assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens
        sizes = decode_sizes(config, scheduler.max_num_seqs)
        if config.enforce_eager or config.cudagraph_mode == "NONE" or not sizes:
            return None
        return sizes, mixed_sizes(config, scheduler.max_num_batched_tokens)

    def _capture(self) -> None:
        wanted, max_rows = self._graph_sizes(), self.config.scheduler.max_num_seqs
        if wanted is None or max_rows is None:
            return
        sizes, mixed = wanted
        began, free = time.monotonic(), torch.cuda.mem_get_info(self.device)[0]
        self.runner.capture(self.config.device.cudagraph_mode, sizes, mixed, max_rows)
        logger.info(
            "captured graphs of up to %d rows and %d tokens in %.1f s, %.2f GiB",
            sizes[-1],
            mixed[-1] if mixed else 0,
            time.monotonic() - began,
            (free - torch.cuda.mem_get_info(self.device)[0]) / 2**30,
        )

    def forward(self, plan: SchedulerOutput) -> None:
        """Enqueues the step up to its hidden states."""
        self.runner.forward(plan)

    def sample(self, plan: SchedulerOutput) -> StepResult:
        """Enqueues logits and draw of the plan given to the last `forward`."""
        return self.runner.sample(plan)

    def late_mask(self) -> LateMask | None:
        """See Executor."""
        return self.runner.late_mask()

    def shutdown(self) -> None:
        """Lets go of the device's memory."""
        if self._runner is not None and self._runner.graphs is not None:
            self._runner.graphs.gate.open()  # or the device would wait for ever
        self._model = self._runner = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _family(self) -> int:
        return torch.cuda.get_device_capability(self.device)[0] if self.device.type == "cuda" else 0

    def _make_runner(self, kv_config: KVCacheConfig, max_model_len: int) -> ModelRunner:
        config = self.config
        assert config.scheduler.max_num_seqs is not None
        num_slots = config.scheduler.max_num_seqs + 1
        sampler = Sampler(
            num_slots,
            self.model.logits_width,
            self.device,
            eos_token_ids=self.description.eos_token_ids,
            logprobs_mode=config.model.logprobs_mode,
            processors=config.model.logits_processors,
        )
        return ModelRunner(
            self.model,
            kv_config,
            sampler,
            num_slots=num_slots,
            max_model_len=max_model_len,
            dtype=self.dtype,
            device=self.device,
            attention_backend=config.device.attention_backend,
        )

    def _kv_bytes_available(self) -> int:
        asked = self.config.cache.kv_cache_memory_bytes
        if self.device.type == "cpu":
            free = free_memory()
            if asked is not None and asked > free:
                raise ConfigError(
                    f"--kv-cache-memory-bytes {asked} is more than the {free} bytes that are free"
                )
            return asked or cpu_kv_bytes(free)
        return asked or self._profile()

    def _profile(self) -> int:
        """What a step of the largest size leaves of the card's share that this process may use."""
        scheduler, cache = self.config.scheduler, self.config.cache
        assert scheduler.max_num_batched_tokens and scheduler.max_num_seqs
        total = torch.cuda.mem_get_info(self.device)[1]
        budget = cache.gpu_memory or int(total * cache.gpu_memory_utilization)
        groups = plan_groups(self.model.kv_specs, cache.block_size)
        kv_config = KVCacheConfig(
            num_blocks=1,
            page_bytes=page_bytes(self.model.kv_specs, cache.block_size),
            num_layers_per_group=max(len(group.layers) for group in groups),
            groups=groups,
        )
        rows, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        counts = [tokens // rows + (row >= rows - tokens % rows) for row in range(rows)]
        length = self.config.model.max_model_len or 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        runner = self._make_runner(
            kv_config, max(counts[-1], length if length > 0 else self.description.max_model_len)
        )
        runner.sampler.add(NewRequest(1, np.zeros(1, np.int32), 1, 0, _COSTLY, []))
        run_dummy(runner, counts, slot=1)
        runner.sampler.remove(1)
        peak = torch.cuda.max_memory_reserved(self.device)
        free = torch.cuda.mem_get_info(self.device)[0]
        outside = total - free - torch.cuda.memory_reserved(self.device)
        graphs = self._profile_graphs(runner)
        del runner
        torch.cuda.empty_cache()
        available = budget - peak - outside - graphs
        gib = 1 << 30
        if available <= 0:
            flag = "--gpu-memory" if cache.gpu_memory else "--gpu-memory-utilization"
            raise ConfigError(
                f"{flag} allows {budget / gib:.2f} GiB, but weights and the largest step take "
                f"{peak / gib:.2f} GiB, graphs {graphs / gib:.2f} GiB, and {outside / gib:.2f} GiB "
                f"are used outside: nothing is left for the KV cache"
            )
        logger.info(
            "%.2f GiB for the KV cache of %.2f; weights and largest step %.2f, graphs %.2f, "
            "outside %.2f", *(size / gib for size in (available, budget, peak, graphs, outside)),
        )  # fmt: skip
        return available

    def _profile_graphs(self, runner: ModelRunner) -> int:
        """Bytes that all graphs will take: the largest and the smallest of each kind are captured,
        which tells the memory that they share; what the others hold for themselves is known."""
        wanted, max_rows = self._graph_sizes(), self.config.scheduler.max_num_seqs
        if wanted is None or max_rows is None:
            return 0
        sizes, mixed = wanted
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info(self.device)[0]
        ends = [sorted({kind[0], kind[-1]}) if kind else [] for kind in wanted]
        runner.capture(self.config.device.cudagraph_mode, ends[0], ends[1], max_rows)
        torch.cuda.synchronize()
        taken = free - torch.cuda.mem_get_info(self.device)[0]
        runner.graphs = runner.pieces = None
        hidden = self.description.hf_config["hidden_size"] * self.dtype.itemsize
        table = sum(tensor[0].nbytes for tensor in runner.slots.device_tables)
        return taken + bytes_between(sizes, mixed, max_rows, hidden, table)


def bytes_between(
    sizes: list[int], mixed: list[int], max_rows: int, hidden: int, table: int
) -> int:
    """What graphs of all but the first and last sizes hold: hidden states of `hidden` bytes a
    token, block tables of `table` bytes a row, and what CUDA keeps of a graph."""
    decodes = sum(size * (hidden + table) + _GRAPH_BYTES for size in sizes[1:-1])
    return decodes + sum(size * hidden + max_rows * table + _GRAPH_BYTES for size in mixed[1:-1])


def warm_up(runner: ModelRunner, max_model_len: int) -> None:
    """One step of each kind, so that none is compiled or loaded by the first who asks for it."""
    prompt = np.zeros(1, np.int32)
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(),
        SamplingParams(top_k=2, top_p=0.9, min_p=0.1),
        SamplingParams(presence_penalty=1.0, repetition_penalty=1.1),
    ]
    for params in kinds:
        runner.sampler.add(NewRequest(1, prompt, 1, 0, params, []))
        run_dummy(runner, [1], slot=1)
        runner.sampler.remove(1)
    grammar = SamplingParams(grammar=GrammarSpec(backend="", kind="regex", text=""))
    runner.sampler.add(NewRequest(1, prompt, 1, 0, grammar, []))
    words = np.full((1, -(-runner.model.logits_width // 32)), -1, np.int32)
    run_dummy(runner, [1], slot=1, mask=TokenMask(np.ones(1, np.int32), words))
    runner.sampler.remove(1)
    few = min(16, max_model_len)
    for counts in ([few], [few, few], [1, few]):
        run_dummy(runner, counts)
    if runner.device.type == "cuda":
        _fill_pinned()
        for counts in launch_sizes(len(runner.slots.num_tokens) - 1, max_model_len):
            run_dummy(runner, counts)


def _fill_pinned() -> None:
    """The allocator of pinned memory keeps blocks by powers of two: afterwards it has what tokens
    and logprobs of the steps in flight take, and none of them waits for cudaHostAlloc."""
    sizes = [1 << n for n in range(9, 18) for _ in range(_PINNED)]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
    held.clear()


def launch_sizes(max_rows: int, max_model_len: int) -> list[list[int]]:
    """Steps that between them launch every form that a kernel takes by number of rows or tokens:
    attention splits keys by powers of two of rows, products have tiles for up to 8, 16, 32 and
    64 tokens, rope for up to 128. Steps within a graph have such forms of their own."""
    rows = [1 << i for i in range(1, max_rows.bit_length())]
    tokens = [n for n in (17, 33, 65, 129) if n <= max_model_len]
    return [*([1] * n for n in rows), [1] * max_rows, *([n] for n in tokens)]


def run_dummy(
    runner: ModelRunner, counts: list[int], slot: int = 0, mask: TokenMask | None = None
) -> None:
    """One step of rows of `counts` zeros; what they keep goes to block 0."""
    rows = len(counts)
    zeros = np.zeros(rows, np.int32)
    plan = SchedulerOutput(
        step=0,
        slots=np.full(rows, slot, np.int32),
        num_computed=zeros,
        num_scheduled=np.array(counts, np.int32),
        num_drafts=zeros,
        sample=np.ones(rows, np.bool_),
        new_blocks=np.empty((0, 4), np.int32),
        mask=mask,
    )
    runner.forward(plan)
    runner.sample(plan).result()


def cpu_kv_bytes(free: int) -> int:
    """The KV cache's size on a CPU with `free` bytes of memory once the weights are loaded."""
    return min(_CPU_KV_BYTES, int(free * _CPU_KV_SHARE))
