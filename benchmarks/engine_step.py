# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a step costs the engine's host, without any model.

Real Scheduler, KVCacheManager, commit and encode; the worker is a stand-in that is not timed. Three
KV groups (full attention and two of sliding windows), prefix cache on and full, one row in ten with
logprobs, two steps in flight, one request added and one finished a step, gc on. Printed in
microseconds and as a ratio to a reference loop of plain Python timed between the steps.

    python benchmarks/engine_step.py [--rows 1 64 256 1024] [--steps 1000] [--runs 5]
"""

import argparse
import gc
import random
import time
from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np

from llmserve.config.cache import CacheConfig
from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.kv_spec import FullAttentionSpec, SlidingWindowSpec
from llmserve.core.messages import EngineRequest, LogprobColumns
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmserve.kv_cache.groups import make_kv_cache_config
from llmserve.scheduler.cost import StepCosts
from llmserve.scheduler.scheduler import Scheduler

SHORT, LONG = 64, 4096  # tokens of context
_BEFORE = 150  # steps, in which the prompts of all rows are computed
VOCABULARY = 50_000
_SPECS = [FullAttentionSpec(2, 64, 2)] + [SlidingWindowSpec(2, 64, 2, window=512)] * 2


@dataclass
class Cost:
    """Microseconds a step; `reference` is the median of the plain loop in the same run.

    `p99` is of one run, the machine's timer ticks (250 a second) and other work included. `own_p99`
    is over the steps' fastest times in several runs of the same requests: the code alone.
    `noise` is the loop's own 99th percentile over its median: the share of p99 that is the machine.
    """

    p50: float
    p99: float
    own_p99: float
    reference: float
    noise: float


def reference_loop(values: list[list[int]]) -> int:
    """The yardstick: some integer work on each of 256 small objects."""
    total = 0
    for value in values:
        value[0] += 1
        total += value[0]
    return total


class _Bench:
    def __init__(self, rows: int, num_waiting: int, context: int, steps: int) -> None:
        self.rng = np.random.default_rng(0)
        self.rows = rows
        self.lifetime = min(rows, 8)
        length = context + 32 + steps + 256
        config = SchedulerConfig(
            max_num_seqs=rows + 1,  # one slot waits for its last token while the next runs
            max_num_batched_tokens=SHORT if rows == 1 else rows * length,
            max_num_queued_reqs=0,
        )
        # what runs, and a little more: the cache is full soon
        each = (context + steps) // 16 + 2
        num_blocks = rows * (each + 2 * min(each, 34) + 2) + 300
        page = _SPECS[0].page_bytes(16)
        kv = make_kv_cache_config(_SPECS, 16, page * num_blocks)
        assert len(kv.groups) == 3
        self.scheduler = Scheduler(
            config, CacheConfig(), kv, max_model_len=length, logits_width=VOCABULARY,
            eos_token_ids=[2], seed=0, max_in_flight=2, costs=StepCosts(None, 1e-4),
        )  # fmt: skip
        self.encoder = msgspec.msgpack.Encoder()
        self.in_flight: deque[SchedulerOutput] = deque()
        self.num_added = 0
        self.columns = LogprobColumns.pack(
            np.zeros((1, 6), np.int32), np.zeros((1, 6), np.float32), np.ones(1, np.int32)
        )
        for i in range(rows - self.lifetime):
            phase = int(self.rng.integers(16))
            self.scheduler.add(self.request(context + phase, steps + 200, i))
        for i in range(self.lifetime):
            self.scheduler.add(self.request(SHORT, i + 1, i))
        for _ in range(num_waiting):
            self.scheduler.add(self.request(SHORT, self.lifetime, 0))

    def request(self, prompt: int, max_tokens: int, i: int) -> EngineRequest:
        self.num_added += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=i % 2 == 0)
        ids = self.rng.integers(3, VOCABULARY, prompt, dtype=np.int32)
        return EngineRequest(
            client=0, request_id=self.num_added, prompt=ids.tobytes(), params=params,
            arrival=time.monotonic(),
        )  # fmt: skip

    def output(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        tokens = self.rng.integers(3, VOCABULARY, (plan.num_rows, 1), dtype=np.int32)
        return ModelRunnerOutput(
            tokens,
            plan.sample.astype(np.int32),
            logprobs=dict.fromkeys(range(0, plan.num_rows, 10), self.columns),
            seconds=1e-3,  # prompts do not hold up anybody
        )

    def step(self) -> float:
        """Seconds of one step."""
        message = self.request(SHORT, self.lifetime, 1)
        output = self.output(self.in_flight[0]) if self.in_flight else None
        start = time.perf_counter()
        self.scheduler.add(message)
        plan = self.scheduler.schedule()
        if plan is not None:
            self.in_flight.append(plan)
        if output is not None:
            self.scheduler.commit(self.in_flight.popleft(), output)
        for outputs in self.scheduler.take_outputs().values():
            self.encoder.encode(outputs)
        return time.perf_counter() - start


def run(
    rows: int, num_waiting: int, context: int, steps: int
) -> tuple[np.ndarray, tuple[float, float]]:
    """Microseconds of each step, and the reference loop's median and 99th percentile."""
    gc.collect()
    gc.freeze()  # as the engine does once it is ready; requests come later
    bench = _Bench(rows, num_waiting, context, steps + _BEFORE)
    objects = [[random.randrange(100)] for _ in range(256)]
    for _ in range(_BEFORE):
        bench.step()
    took, reference = [], []
    for _ in range(steps):
        took.append(bench.step())
        start = time.perf_counter()
        reference_loop(objects)
        reference.append(time.perf_counter() - start)
    gc.unfreeze()
    finished = bench.num_added - len(bench.scheduler.requests)
    assert finished >= 0.7 * steps, f"only {finished} requests finished in {steps} steps"
    middle, late = (np.percentile(reference, (50, 99)) * 1e6).tolist()
    return np.array(took) * 1e6, (middle, late)


def measure(rows: int, num_waiting: int, context: int, steps: int, runs: int = 1) -> Cost:
    """Cost of a step at `rows` running requests; of the runs, the one with the median p99."""
    took, loops = zip(*[run(rows, num_waiting, context, steps) for _ in range(runs)], strict=True)
    own_p99 = float(np.percentile(np.min(took, axis=0), 99))
    p50, p99 = np.percentile(took, (50, 99), axis=1)
    middling = int(p99.argsort()[runs // 2])
    middle, late = loops[middling]
    return Cost(float(p50[middling]), float(p99[middling]), own_p99, middle, late / middle)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(" rows waiting context |   p50 us   p99 us  own p99 | p50/ref p99/ref | ref us, p99/p50")
    for rows in args.rows:
        for num_waiting in (0, 10_000):
            for context in (SHORT, LONG):
                cost = measure(rows, num_waiting, context, args.steps, args.runs)
                print(
                    f"{rows:5d} {num_waiting:7d} {context:7d} | {cost.p50:8.0f} {cost.p99:8.0f} "
                    f"{cost.own_p99:8.0f} | "
                    f"{cost.p50 / cost.reference:7.1f} {cost.p99 / cost.reference:7.1f} | "
                    f"{cost.reference:6.1f} {cost.noise:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
