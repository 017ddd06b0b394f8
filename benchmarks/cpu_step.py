# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Decode steps of the demo model on a CPU, without an engine around them: milliseconds by kind.

    GOMP_SPINCOUNT=20000 python benchmarks/cpu_step.py [--threads 2] [--eager]

`CXX=none` before it is a machine without a compiler. The least of the steps is the machine's own;
what others do on it shows in the median, and in the process's time.
"""

import argparse
import dataclasses
import time

import numpy as np
import torch

from llmserve.config.hf import describe
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest, SchedulerOutput
from llmserve.kv_cache.groups import page_bytes, plan_groups
from llmserve.model_loader.loader import load_model
from llmserve.models.registry import MODELS
from llmserve.sampling.sampler import Sampler
from llmserve.worker.model_runner import ModelRunner

LENGTH, PROMPT, BLOCK, SLOTS = 512, 32, 16, 33


def _runner(dtype: torch.dtype) -> ModelRunner:
    cpu = torch.device("cpu")
    model = describe(ModelConfig(model=""), LoadConfig())
    model = dataclasses.replace(model, max_model_len=LENGTH)
    net = load_model(MODELS.load(model.architecture), model, LoadConfig(), dtype, cpu)
    groups = plan_groups(net.kv_specs, BLOCK)
    kv = KVCacheConfig(
        num_blocks=SLOTS * LENGTH // BLOCK + 1,
        page_bytes=page_bytes(net.kv_specs, BLOCK),
        num_layers_per_group=max(len(group.layers) for group in groups),
        groups=groups,
    )
    sampler = Sampler(SLOTS, net.logits_width, cpu, eos_token_ids=[])
    return ModelRunner(
        net, kv, sampler, num_slots=SLOTS, max_model_len=LENGTH, dtype=dtype, device=cpu
    )


def _plan(
    step: int, slots: list[int], done: int, count: int, new: list[NewRequest]
) -> SchedulerOutput:
    rows = len(slots)
    return SchedulerOutput(
        step=step,
        slots=np.array(slots, np.int32),
        num_computed=np.full(rows, done, np.int32),
        num_scheduled=np.full(rows, count, np.int32),
        num_drafts=np.zeros(rows, np.int32),
        sample=np.ones(rows, np.bool_),
        new_blocks=np.empty((0, 4), np.int32),
        new_requests=new,
    )


def measure(runner: ModelRunner, rows: int, steps: int) -> tuple[float, np.ndarray]:
    """Seconds of the prompts' step, and of each step after it."""
    slots, each = list(range(1, rows + 1)), LENGTH // BLOCK
    new = [
        NewRequest(
            slot, np.random.randint(100, 40_000, PROMPT).astype(np.int32), PROMPT, 0,
            SamplingParams(temperature=0.0), [list(range(slot * each - each + 1, slot * each + 1))],
        )
        for slot in slots
    ]  # fmt: skip
    times = []
    for step in range(steps + 1):
        plan = (
            _plan(step, slots, PROMPT + step - 1, 1, [])
            if step
            else _plan(0, slots, 0, PROMPT, new)
        )
        began = time.perf_counter()
        runner.forward(plan)
        runner.sample(plan).result()
        times.append(time.perf_counter() - began)
    for slot in slots:
        runner.sampler.remove(slot)
    return times[0], np.array(times[1:])


def main() -> None:
    """Measures each dtype and number of rows twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--eager", action="store_true", help="steps op by op, not recorded")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtype:
        runner = _runner(getattr(torch, dtype))
        if not args.eager:
            runner.record(max(args.rows))
        for rows in args.rows * 2:
            began = time.process_time()
            prompts, times = measure(runner, rows, args.steps)
            spent = time.process_time() - began
            print(
                f"{dtype} {rows} rows: prompts {prompts * 1e3:.1f} ms, step min "
                f"{times.min() * 1e3:.2f} median {np.median(times) * 1e3:.2f} ms, "
                f"process {spent / args.steps * 1e3:.1f} ms a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
