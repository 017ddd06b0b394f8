# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A resolved config for a tiny dummy model, and a request driven through an Executor."""

from typing import Any

import numpy as np

from llmserve.config.engine import EngineConfig
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest, SchedulerOutput, TokenMask
from llmserve.executor.base import Executor, ModelFacts
from llmserve.kv_cache.groups import make_kv_cache_config


def tiny_config(**flags: Any) -> EngineConfig:
    """As engine.resolve would give it."""
    defaults: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "cpu_threads": 1, "load_format": "dummy",
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128,
        "kv_cache_memory_bytes": 1 << 20,
    }  # fmt: skip
    return EngineConfig.from_flags(**(defaults | flags))


def tiny_kv(facts: ModelFacts) -> KVCacheConfig:
    """The pool that fits."""
    return make_kv_cache_config(facts.kv_specs, 16, facts.kv_bytes_available)


def plan_of(
    step: int, computed: int, count: int, sample: bool = True, new: list[NewRequest] | None = None
) -> SchedulerOutput:
    """One row in slot 1."""
    slots, done, todo, drafts = (np.array([x], np.int32) for x in (1, computed, count, 0))
    return SchedulerOutput(
        step, slots, done, todo, drafts, np.array([sample]), np.empty((0, 4), np.int32), new or []
    )


def generate(
    executor: Executor,
    prompt: list[int],
    num_tokens: int,
    mask: TokenMask | None = None,
    **params: Any,
) -> list[int]:
    """Starts all steps before it reads the first result. Blocks 1 to 8 are the request's.

    `mask` is every step's; it needs a grammar among the `params`.
    """
    params = {"temperature": 1.0, "max_tokens": None} | params
    new = NewRequest(
        1, np.array(prompt, np.int32), len(prompt), 7, SamplingParams(**params), [list(range(1, 9))]
    )
    handles = []
    for i in range(num_tokens):
        start, count = (len(prompt) + i - 1, 1) if i else (0, len(prompt))
        plan = plan_of(i + 1, start, count, new=None if i else [new])
        executor.forward(plan)
        plan.mask = mask
        handles.append(executor.sample(plan))
    return [int(handle.result().token_ids[0, 0]) for handle in handles]
