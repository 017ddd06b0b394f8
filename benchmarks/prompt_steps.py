# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a step takes with a part of a long prompt in it, by the part's length and its context.

    python -m benchmarks.prompt_steps MODEL [--prompt 32000] [--streams 8] [--parts 64 512 2048]

The engine in this process, weights as `--load-format` has them, streams that decode, and prompts
one after the other, each cut into parts of the same length. Milliseconds from one result to the
next, as StepCosts sees them: the median over each eighth of the prompt.
"""

import argparse
from pathlib import Path

import numpy as np

from llmserve.scheduler.cost import StepCosts
from tests.helpers.engine import Engine


class _Parts(StepCosts):
    """Cuts prompts into parts of `least` tokens, and notes what the steps took."""

    def __init__(self, part: int) -> None:
        super().__init__(None, 0.0, least=part)
        self.alone: list[float] = []
        self.beside: list[float] = []

    def room(self, num_decodes: int) -> float:
        return float(self.least)

    def observe(self, num_decodes: int, weight: float, seconds: float) -> None:
        (self.beside if weight else self.alone).append(seconds)


def measure(engine: Engine, part: int, prompt: int, streams: int) -> tuple[float, list[float]]:
    """Milliseconds of a step without a prompt, and in each eighth of it."""
    rng = np.random.default_rng(part)
    costs = _Parts(part)
    engine.core.scheduler._costs = costs
    for _ in range(streams):
        engine.add(rng.integers(100, 900, 64).tolist(), max_tokens=prompt // part + 200)
    for _ in range(100):
        engine.step()
    costs.alone.clear()
    for _ in range(60):
        engine.step()
    alone = float(np.median(costs.alone)) * 1e3
    costs.beside.clear()
    engine.add(rng.integers(100, 900, prompt).tolist(), max_tokens=1)
    engine.run()
    eighths = np.array_split(np.array(costs.beside[: prompt // part]) * 1e3, 8)
    return alone, [float(np.median(eighth)) for eighth in eighths]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=32_000)
    parser.add_argument("--streams", type=int, default=8)
    parts = [64, 128, 192, 256, 384, 512, 640, 1024, 2048]
    parser.add_argument("--parts", type=int, nargs="+", default=parts)
    args = parser.parse_args()
    engine = Engine(
        args.model, device=args.device, dtype=args.dtype, load_format=args.load_format,
        skip_tokenizer_init=True, enable_prefix_caching=False,
        max_model_len=args.prompt + 1024, max_num_seqs=args.streams + 1,
    )  # fmt: skip
    ends = [args.prompt * eighth // 8 for eighth in range(1, 9)]
    print("part | alone | " + " ".join(f"{end:7d}" for end in ends) + "  ms, by context up to")
    for part in args.parts:
        for _ in range(2):  # the first time compiles
            alone, eighths = measure(engine, part, args.prompt, args.streams)
        print(f"{part:4d} | {alone:5.2f} | " + " ".join(f"{ms:7.2f}" for ms in eighths), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
