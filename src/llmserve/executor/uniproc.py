# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The worker in the engine's own process."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.scheduler_output import LateMask, ModelRunnerOutput, SchedulerOutput
from llmserve.executor.base import Executor, ModelFacts, StepHandle
from llmserve.worker.worker import Worker


class UniProcExecutor(Executor):
    """On CUDA the device's stream is the queue of steps; on a CPU one thread is.

    Torch lets go of the interpreter lock inside its calls, so the engine plans meanwhile. What goes
    wrong in `forward` on a CPU is raised by the step's handle.
    """

    def __init__(self, config: EngineConfig, model: ModelDescription) -> None:
        super().__init__(config, model)
        self.worker = Worker(config, model)
        self._thread: ThreadPoolExecutor | None = None
        self._forward: Future[None] | None = None
        threads = config.device.cpu_threads
        if config.device.device == "cpu":
            self._thread = ThreadPoolExecutor(
                1, "worker", *((torch.set_num_threads, (threads,)) if threads else ())
            )

    def load(self) -> ModelFacts:
        """See Executor."""
        load = self.worker.load
        return ModelFacts(**(self._thread.submit(load).result() if self._thread else load()))

    def initialize_kv_cache(self, kv_config: KVCacheConfig) -> None:
        """See Executor. `self.config` has its final context length by now."""
        length = self.config.model.max_model_len
        assert length is not None
        if self._thread:
            self._thread.submit(self.worker.initialize_kv_cache, kv_config, length).result()
        else:
            self.worker.initialize_kv_cache(kv_config, length)

    def forward(self, plan: SchedulerOutput) -> None:
        """See Executor."""
        if self._thread:
            self._forward = self._thread.submit(self.worker.forward, plan)
        else:
            self.worker.forward(plan)

    def sample(self, plan: SchedulerOutput) -> StepHandle:
        """See Executor."""
        if not self._thread:
            return self.worker.sample(plan)
        assert self._forward is not None, "sample without its forward"
        return self._thread.submit(self._sample, plan, self._forward)

    def _sample(self, plan: SchedulerOutput, forward: Future[None]) -> ModelRunnerOutput:
        forward.result()
        return self.worker.sample(plan).result()

    def late_mask(self, plan: SchedulerOutput) -> LateMask | None:
        """See Executor. On a CPU the thread would have to wait, and nothing is won."""
        return None if self._thread else self.worker.late_mask()

    def compilations(self) -> dict[str, int]:
        """See Executor."""
        return self.worker.compilations()

    def shutdown(self) -> None:
        """See Executor."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
        self.worker.shutdown()
