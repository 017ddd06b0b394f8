# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Where the time of one decode step goes: the engine's own loop, in this process, traced."""

import time
from typing import Any, NamedTuple

import numpy as np

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription, describe
from llmserve.core.kv_spec import SlidingWindowSpec
from llmserve.core.messages import EngineRequest, ModelInfo
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.core import EngineCore
from llmserve.engine.resolve import build
from llmserve.errors import ConfigError
from llmserve.models.common import Fields
from llmserve.models.registry import MODELS
from llmserve.worker.device import detect
from llmserve.worker.step_trace import Trace, copy_bandwidth, record

_WARM_STEPS = 20
_STEPS = 50
_SHOWN = 20


class Floor(NamedTuple):
    """What a decode step cannot avoid to read, and how fast the card reads."""

    weight_bytes: int
    kv_bytes: int
    bandwidth: float  # bytes a second

    @property
    def us(self) -> float:
        """Microseconds of a step that does nothing else."""
        return (self.weight_bytes + self.kv_bytes) / self.bandwidth * 1e6


def step_bytes(
    info: ModelInfo, description: ModelDescription, batch_size: int, context: int
) -> tuple[int, int]:
    """Bytes of weights and of KV that one step of `batch_size` tokens at `context` tokens reads.
    Of an embedding that is not the output projection too, only the step's rows are read."""
    decoder = MODELS.load(description.architecture).read(Fields(description.hf_config))
    row = decoder.hidden_size * (4 if info.dtype == "float32" else 2)
    unread = 0 if decoder.tied else (decoder.vocab_size - batch_size) * row
    kv = sum(
        spec.page_bytes(1)
        * (min(context, spec.window) if isinstance(spec, SlidingWindowSpec) else context)
        for spec in info.kv_specs
    )
    return info.weight_bytes - unread, batch_size * kv


def report(trace: Trace, wall_us: float, batch_size: int, context: int, floor: Floor) -> str:
    """The table. `wall_us` of a step is taken without the profiler, which slows the host."""
    busy = trace.busy_us / trace.num_steps
    rows = trace.by_kernel()
    lines = [
        (
            f"batch {batch_size}, context {context}: {wall_us / 1000:.3f} ms a step "
            f"({batch_size / wall_us * 1e6:,.0f} tok/s), device busy {busy / 1000:.3f} ms, "
            f"idle {max(0.0, 1 - busy / wall_us):.1%} ({trace.idle_share:.1%} while traced)"
        ),
        (
            f"floor {floor.us / 1000:.3f} ms: {floor.weight_bytes / 1e9:.3f} GB of weights and "
            f"{floor.kv_bytes / 1e9:.3f} GB of KV at {floor.bandwidth / 1e12:.2f} TB/s (a copy in "
            f"this run); the step takes {wall_us / floor.us:.2f} times that"
        ),
        (
            f"{'us a step':>10} {'share':>6} {'a step':>7}  kernel "
            f"({sum(row[1] for row in rows):.0f} a step; overlapping ones count from their start)"
        ),
    ]
    for us, count, name in rows[:_SHOWN]:
        lines.append(f"{us:10.1f} {us / busy:6.1%} {count:7.1f}  {name[:100]}")
    rest = rows[_SHOWN:]
    if rest:
        us, count = sum(r[0] for r in rest), sum(r[1] for r in rest)
        lines.append(f"{us:10.1f} {us / busy:6.1%} {count:7.1f}  {len(rest)} others")
    if trace.offenders:
        lines.append(f"in these {trace.num_steps} steps: {', '.join(trace.offenders)}")
    return "\n".join(lines)


def run_steps(core: EngineCore, count: int) -> None:
    """Engine steps whose news nobody reads."""
    for _ in range(count):
        core.step()
        core.take_outputs()


def start_batch(core: EngineCore, prompts: list[list[int]], max_tokens: int) -> None:
    """Adds the prompts and steps until each of them has its first token."""
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=max_tokens)
    for number, prompt in enumerate(prompts):
        ids = np.array(prompt, np.int32).tobytes()
        core.add(
            EngineRequest(
                client=0, request_id=number, prompt=ids, params=params, arrival=time.monotonic()
            )
        )
    waiting = set(range(len(prompts)))
    while waiting:
        core.step()
        for news in core.take_outputs().values():
            waiting -= set(np.frombuffer(news.ids, np.uint32).tolist())


def profile_decode(flags: dict[str, Any], prompts: list[list[int]]) -> str:
    """The report for a batch of `prompts` of one length. ConfigError without a CUDA device."""
    config = EngineConfig.from_flags(**flags)
    if detect(config.device.device).kind != "cuda":
        raise ConfigError("--profile needs a CUDA device, and there is none")
    description = describe(config.model, config.load)
    bandwidth = copy_bandwidth()  # first: the engine takes the card's memory
    core, info = build(config, description)
    batch_size = len(prompts)
    steps = _WARM_STEPS + 2 * _STEPS
    try:
        if len(prompts[0]) + steps + 2 > info.max_model_len:
            raise ConfigError(
                f"--profile decodes {steps} tokens: --input-len {len(prompts[0])} and these are "
                f"over --max-model-len {info.max_model_len}"
            )
        if batch_size > info.max_num_seqs:
            raise ConfigError(
                f"--batch-size {batch_size} is over --max-num-seqs {info.max_num_seqs}"
            )
        start_batch(core, prompts, 2 * steps)
        run_steps(core, _WARM_STEPS)
        began = time.perf_counter()
        run_steps(core, _STEPS)
        wall_us = (time.perf_counter() - began) / _STEPS * 1e6
        with record(_STEPS) as recorder:
            run_steps(core, _STEPS)
    finally:
        core.shutdown()
    context = len(prompts[0]) + _WARM_STEPS + 3 * _STEPS // 2
    floor = Floor(*step_bytes(info, description, batch_size, context), bandwidth)
    return report(recorder.trace, wall_us, batch_size, context, floor)
