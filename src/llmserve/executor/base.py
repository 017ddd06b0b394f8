# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The seam between the engine and whatever runs the model. Torch-free."""

from abc import ABC, abstractmethod
from typing import Protocol

import msgspec

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import AnyKVSpec, KVCacheConfig
from llmserve.core.scheduler_output import LateMask, ModelRunnerOutput, SchedulerOutput


class ModelFacts(msgspec.Struct, kw_only=True):
    """What is known once the weights are loaded."""

    architecture: str
    logits_width: int
    kv_specs: list[AnyKVSpec]  # by layer id
    weight_bytes: int
    kv_bytes_available: int
    device: str
    dtype: str
    kernels: dict[str, str] = {}  # layer kind -> what runs it


class StepHandle(Protocol):
    """A step in flight."""

    def result(self) -> ModelRunnerOutput:
        """Waits for the step's tokens."""
        ...


class Executor(ABC):
    """Runs plans, strictly in the order given. `forward` and `sample` return at once."""

    def __init__(self, config: EngineConfig, model: ModelDescription) -> None:
        self.config = config
        self.model = model

    @abstractmethod
    def load(self) -> ModelFacts:
        """Loads the weights and measures what is left for KV."""

    @abstractmethod
    def initialize_kv_cache(self, kv_config: KVCacheConfig) -> None:
        """Allocates the pool, warms up, captures graphs. Nothing is allocated afterwards."""

    @abstractmethod
    def forward(self, plan: SchedulerOutput) -> None:
        """Starts the step up to its final hidden states."""

    @abstractmethod
    def sample(self, plan: SchedulerOutput) -> StepHandle:
        """Starts logits and draw of the plan given to the last `forward`, its mask set by now
        unless `late_mask` gave one."""

    def late_mask(self, plan: SchedulerOutput) -> LateMask | None:
        """For the mask of the plan given to the last `forward`, all of whose rows draw. None: it
        must be the plan's before `sample`."""
        return None

    def compilations(self) -> dict[str, int]:
        """What the worker has compiled or loaded since it was ready; kinds without any left out.
        Only an executor whose worker is in this process counts."""
        return {}

    @abstractmethod
    def shutdown(self) -> None:
        """Frees the device; idempotent."""
