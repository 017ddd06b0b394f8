# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What drawing a step's tokens costs on a GPU, and whether a CPU draws the same.

`step` is a whole Sampler.sample between two device waits; `host` is what it takes to enqueue one;
`graph` is the replay of its draw captured in a CUDA graph. In milliseconds, medians.

    python benchmarks/draw.py [--rows 1 256] [--width 151936] [--check]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest
from llmserve.kernels.draw import draw_rows
from llmserve.sampling.sampler import Sampler

_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def _sampler(device: str, n: int, width: int, params: dict[str, Any]) -> Sampler:
    sampler = Sampler(n + 1, width, torch.device(device), eos_token_ids=[2])
    for slot in range(1, n + 1):
        limits = SamplingParams(max_tokens=None, **params)
        sampler.add(NewRequest(slot, np.zeros(1, np.int32), 1, 1000 + slot, limits, []))
    return sampler


def _median(call: Callable[[], Any], wait: bool, repeats: int = 50) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if wait:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _graph(sampler: Sampler, logits: torch.Tensor, params: dict[str, Any]) -> float:
    n = len(logits)
    slots = torch.arange(1, n + 1, device="cuda")
    index = torch.zeros(n, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw_rows(
            logits, slots, sampler._device_params, sampler._device_seeds, index, sampler._arrived,
            random=params["temperature"] > 0, truncated=len(params) > 1,
        )  # fmt: skip
    return _median(graph.replay, wait=True)


def main() -> None:
    """Prints one line for each kind of request, number of rows and shape of the logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--width", type=int, default=151_936)
    parser.add_argument("--check", action="store_true", help="draw on the CPU too and compare")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), f"width {args.width}")
    for n in args.rows:
        noise = torch.randn(n, args.width, device="cuda")
        # Flat as of random weights; peaked as of a trained model: a few far above the rest
        shapes = {"flat": noise, "peaked": noise * 2 + 12 * (noise / 4.5).clamp(min=0) ** 4}
        for shape, logits in shapes.items():
            for kind, params in _KINDS.items():
                sampler = _sampler("cuda", n, args.width, params)
                slots, index = np.arange(1, n + 1, dtype=np.int32), np.zeros(n, np.int32)

                def step(sampler: Sampler = sampler, slots: Any = slots, index: Any = index,
                         logits: torch.Tensor = logits) -> Any:  # fmt: skip
                    return sampler.sample(logits, slots, index)

                drawn = step()
                line = f"{n:5} {shape:7} {kind:12} step {_median(step, True):7.3f}"
                line += f"  host {_median(step, False):7.3f}"
                line += f"  graph {_graph(sampler, logits, params):7.3f}"
                if args.check:
                    other = _sampler("cpu", n, args.width, params)
                    expected = other.sample(logits.cpu(), slots, index)
                    differing = (drawn.token_ids.cpu() != expected.token_ids).sum().item()
                    line += f"  differing {differing} invalid {drawn.invalid.sum().item()}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
