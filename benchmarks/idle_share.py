# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of the time of a mixed load the card has nothing to do, and what it does otherwise.

    python -m benchmarks.idle_share MODEL [--requests 256] [--least 100] [--most 1024]

The engine in this process, on dummy weights: prompts and answers of random lengths, all at once.
Three rounds of the same requests: one warms up, one gives the time, without the profiler, which
slows the host, and one the device's own work. `llmserve bench latency --profile` is the same for
steps that are all alike.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from llmserve.worker.step_trace import record
from tests.helpers.engine import Engine

_SHOWN = 12  # kernels


def run(engine: Engine, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds and steps until all requests have ended."""
    rng = np.random.default_rng(0)
    for _ in range(args.requests):
        length, answer = rng.integers(args.least, args.most, 2, endpoint=True).tolist()
        engine.add(rng.integers(engine.info.logits_width, size=length).tolist(), max_tokens=answer)
    began, steps = time.perf_counter(), 0
    while engine.core.has_work:
        engine.core.step()
        engine.core.take_outputs()
        steps += 1
    return time.perf_counter() - began, steps


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--least", type=int, default=100, help="tokens of a prompt or an answer")
    parser.add_argument("--most", type=int, default=1024)
    args = parser.parse_args()
    engine = Engine(
        args.model, device=args.device, dtype=args.dtype, load_format="dummy",
        skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=2 * args.most,
        max_num_seqs=args.requests,
    )  # fmt: skip
    run(engine, args)
    wall, steps = run(engine, args)
    with record(steps) as recorder:
        run(engine, args)
    engine.close()
    trace = recorder.trace
    busy = trace.busy_us / 1e6
    print(
        f"{args.requests} requests, in and out {args.least} to {args.most}: {steps} steps in "
        f"{wall:.2f} s, device busy {busy:.2f} s, idle {1 - busy / wall:.1%} "
        f"({trace.idle_share:.1%} while traced)"
    )
    for us, count, name in trace.by_kernel()[:_SHOWN]:
        print(f"{us:10.1f} us a step {us * steps / 1e6 / busy:6.1%} {count:7.1f}  {name[:100]}")
    print("calls that wait or allocate: " + (", ".join(trace.offenders) or "none"))


if __name__ == "__main__":
    main()
