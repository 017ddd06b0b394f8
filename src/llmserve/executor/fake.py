# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""An executor without a model: for tests of everything above it. Torch-free."""

import time
from typing import Any

import numpy as np

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import AnyKVSpec, FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from llmserve.core.messages import LogprobColumns
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmserve.executor.base import Executor, ModelFacts

_BASE = np.uint64(0x9E3779B97F4A7C15)


class FakeHandle:
    """A step that is done at `ready` (time.monotonic, seconds)."""

    def __init__(self, output: ModelRunnerOutput, ready: float) -> None:
        self.output = output
        self.ready = ready

    def result(self) -> ModelRunnerOutput:
        """Sleeps until the step is done."""
        if (wait := self.ready - time.monotonic()) > 0:
            time.sleep(wait)
        return self.output


class FakeExecutor(Executor):
    """Draws a token that is a hash of all tokens before it, so it shows any token lost or doubled.

    Options come from `hf_config["fake"]`: `logits_width`, `num_layers`, `num_window_layers` and
    `window`, `delay` (seconds a step), `script` (token ids; output i is script[i mod length]).
    Each plan is checked against what the slots hold: AssertionError where it does not fit.
    """

    def __init__(self, config: EngineConfig, model: ModelDescription) -> None:
        super().__init__(config, model)
        options: dict[str, Any] = model.hf_config.get("fake", {})
        self.logits_width: int = options.get(
            "logits_width", model.hf_config.get("vocab_size", 32000)
        )
        self.num_layers: int = options.get("num_layers", 2)
        self.num_window_layers: int = options.get("num_window_layers", 0)
        self.window: int = options.get("window", 64)
        self.delay: float = options.get("delay", 0.0)
        self.script = np.array(options.get("script", []), np.int64)
        self.ready = 0.0
        self.started_step = -1
        self.powers = np.ones(1, np.uint64)  # _BASE ** i mod 2 ** 64
        self.hash = np.zeros(1, np.uint64)  # [num_slots]: sum of (token + 1) * powers
        self.num_tokens = np.zeros(1, np.int64)
        self.num_computed = np.zeros(1, np.int64)
        self.num_prompt = np.zeros(1, np.int64)
        self.num_blocks = np.zeros((1, 1), np.int64)  # [num_slots, num_groups]
        self.params: dict[int, SamplingParams] = {}
        self.prompts: dict[int, np.ndarray] = {}
        self.block_sizes = np.ones(1, np.int64)
        self.num_pool_blocks = 0

    def load(self) -> ModelFacts:
        """Facts of a model with two heads of 16 a layer."""
        full: list[AnyKVSpec] = [FullAttentionSpec(2, 16, 4)] * (
            self.num_layers - self.num_window_layers
        )
        window: list[AnyKVSpec] = [
            SlidingWindowSpec(2, 16, 4, self.window)
        ] * self.num_window_layers
        return ModelFacts(
            architecture=self.model.architecture,
            logits_width=self.logits_width,
            kv_specs=full + window,
            weight_bytes=0,
            kv_bytes_available=self.config.cache.kv_cache_memory_bytes or 64 << 20,
            device="cpu",
            dtype="float32",
            kernels={"attention": "fake"},
        )

    def initialize_kv_cache(self, kv_config: KVCacheConfig) -> None:
        """Remembers the pool's size."""
        self.block_sizes = np.array([group.block_size for group in kv_config.groups])
        self.num_pool_blocks = kv_config.num_blocks
        self.num_blocks = np.zeros((len(self.hash), len(kv_config.groups)), np.int64)

    def forward(self, plan: SchedulerOutput) -> None:
        """Applies the plan's changes to the slots and checks its rows."""
        self.started_step = plan.step
        for slot in plan.released:
            del self.params[slot]
            self.prompts.pop(slot, None)
        for new in plan.new_requests:
            self._enter(new.slot, new.token_ids, new.num_prompt_tokens, new.params, new.blocks)
        if len(plan.new_blocks):
            slots, groups, index, ids = plan.new_blocks.T
            assert ids.min() > 0 and ids.max() < self.num_pool_blocks, "block outside the pool"
            np.maximum.at(self.num_blocks, (slots, groups), index + 1)
        slots, end = plan.slots, plan.num_computed + plan.num_scheduled
        computed = self.num_computed[slots]
        assert ((computed == plan.num_computed) | (computed < 0)).all(), "positions out of order"
        assert (plan.num_scheduled > 0).all() and (end <= self.num_tokens[slots]).all(), (
            "more positions than tokens"
        )
        assert (self.num_blocks[slots] * self.block_sizes >= end[:, None]).all(), "blocks missing"
        assert (plan.sample == (end == self.num_tokens[slots])).all(), "samples where it may not"
        self.num_computed[slots] = end

    def sample(self, plan: SchedulerOutput) -> FakeHandle:
        """Draws for the plan given to the last `forward`."""
        assert plan.step == self.started_step, "sample without its forward"
        output = ModelRunnerOutput(
            np.zeros((plan.num_rows, 1), np.int32), plan.sample.astype(np.int32)
        )
        rows = np.flatnonzero(plan.sample)
        slots = plan.slots[rows]
        count = self.num_tokens[slots]
        if len(self.script):
            tokens = self.script[(count - self.num_prompt[slots]) % len(self.script)]
        else:
            mixed = self.hash[slots] * _BASE
            tokens = ((mixed ^ (mixed >> np.uint64(32))) % np.uint64(self.logits_width)).astype(
                np.int64
            )
        self._reach(int(count.max(initial=0)) + 1)
        self.hash[slots] += (tokens + 1).astype(np.uint64) * self.powers[count]
        self.num_tokens[slots] += 1
        output.token_ids[rows, 0] = tokens
        for row, slot, token in zip(rows.tolist(), slots.tolist(), tokens.tolist(), strict=True):
            if (k := self.params[slot].logprobs) is not None:
                output.logprobs[row] = self._columns(np.array([token]), k)
        if plan.prompt_logprobs is not None:
            for row in np.flatnonzero(plan.prompt_logprobs).tolist():
                slot, first = int(plan.slots[row]), int(plan.num_computed[row]) + 1
                targets = self.prompts[slot][first : first + int(plan.num_scheduled[row])]
                if len(targets):
                    k = self.params[slot].prompt_logprobs or 0
                    output.prompt_logprobs[row] = self._columns(targets, k)
        output.seconds = self.delay
        self.ready = max(self.ready, time.monotonic()) + self.delay
        return FakeHandle(output, self.ready)

    def shutdown(self) -> None:
        """Nothing to free."""

    def _columns(self, tokens: np.ndarray, k: int) -> LogprobColumns:
        width = self.logits_width if k < 0 else k
        steps = np.arange(width + 1)
        ids = (tokens[:, None] + np.maximum(steps - 1, 0)) % self.logits_width
        logprobs = np.broadcast_to(-0.5 * np.maximum(steps, 1), ids.shape)
        return LogprobColumns.pack(ids, logprobs, np.ones(len(tokens), np.int32))

    def _reach(self, length: int) -> None:
        if length > len(self.powers):
            powers = np.full(2 * length, _BASE)
            powers[0] = 1
            self.powers = np.multiply.accumulate(powers)

    def _enter(
        self,
        slot: int,
        token_ids: np.ndarray,
        num_prompt: int,
        params: SamplingParams,
        blocks: list[list[int]],
    ) -> None:
        assert slot > 0 and slot not in self.params, f"slot {slot} is taken"
        if slot >= len(self.hash):
            grow = 2 * slot - len(self.hash)
            for name in ("hash", "num_tokens", "num_computed", "num_prompt"):
                setattr(self, name, np.pad(getattr(self, name), (0, grow)))
            self.num_blocks = np.pad(self.num_blocks, ((0, grow), (0, 0)))
        count = len(token_ids)
        self._reach(count)
        weights = (token_ids.astype(np.int64) + 1).astype(np.uint64)
        self.hash[slot] = (weights * self.powers[:count]).sum()
        self.num_tokens[slot] = count
        self.num_computed[slot] = -1  # the first row may start behind cached tokens
        self.num_prompt[slot] = num_prompt
        self.num_blocks[slot] = [len(ids) for ids in blocks]
        self.params[slot] = params
        if params.prompt_logprobs is not None:
            self.prompts[slot] = token_ids[:num_prompt].copy()
