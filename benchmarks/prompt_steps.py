# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a step takes with a part of a long prompt in it, by the part's length and its context, and
what StepCosts says of it.

    python -m benchmarks.prompt_steps MODEL [--prompt 32000] [--streams 8] [--parts 64 512 2048]

The engine in this process, weights as `--load-format` has them, streams that decode, and prompts
one after the other. First each is cut into parts of the same length; below what was measured stands
what StepCosts, which had seen the steps before it, would have said. Then StepCosts cuts them as it
does when serving. Milliseconds as the device has them (ModelRunnerOutput.seconds), "gaps" by the
host between two results; medians over each eighth of the prompt.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmserve.scheduler.cost import Room, StepCosts, _level, _size_of
from tests.helpers.engine import Engine


class Step(NamedTuple):
    """With a part of a prompt; seconds. `ended` is the host's clock."""

    start: int
    tokens: int
    seconds: float
    predicted: float
    ended: float


class Costs(StepCosts):
    """Notes what the steps took and what it would have said; with `part`, prompts are cut into
    parts of so many tokens."""

    def __init__(self, context_cost: float, part: int | None = None) -> None:
        super().__init__(None, context_cost)
        self.part = part
        self.alone: list[float] = []
        self.beside: list[Step] = []
        if part is not None:
            self.least = part

    def room(self, num_decodes: int, start: int) -> Room:
        """See StepCosts."""
        if self.part is None:
            return super().room(num_decodes, start)
        return Room(self.part, self.weight(start, self.part) * (1 + 1e-9))

    def predict(self, num_decodes: int, start: int, count: int) -> float:
        """Seconds of a step with that part of a prompt; 0 while nothing is known."""
        weight = self.weight(start, count)
        size = self._nearest(_size_of(num_decodes + count), _level(weight / count))
        return self._alone(num_decodes) + size.rate * weight if size else 0.0

    def observe(self, num_decodes: int, tokens: int, weight: float, seconds: float) -> None:
        """See StepCosts."""
        if not tokens:
            self.alone.append(seconds)
        else:
            start = 0
            if self._context_cost:
                start = round((weight / tokens - 1) / self._context_cost - tokens / 2)
            said = self.predict(num_decodes, start, tokens)
            self.beside.append(Step(start, tokens, seconds, said, time.perf_counter()))
        super().observe(num_decodes, tokens, weight, seconds)


def measure(engine: Engine, costs: Costs, prompt: int, streams: int, steps: int) -> float:
    """Milliseconds of a step without a prompt; `costs` has those with one. The streams decode for
    `steps` steps more than a prompt in parts of 64 tokens takes."""
    rng, top = np.random.default_rng(costs.part or 1), engine.info.logits_width
    engine.core.scheduler._costs = costs
    for _ in range(streams):
        engine.add(rng.integers(top, size=64).tolist(), max_tokens=prompt // 32 + 2 * steps)
    for _ in range(steps):
        engine.step()
    costs.alone.clear()
    for _ in range(steps // 2):
        engine.step()
    alone = float(np.median(costs.alone)) * 1e3
    costs.beside.clear()
    long = engine.add(rng.integers(top, size=prompt).tolist(), max_tokens=1)
    while engine.results[long].finish_reason is None:
        engine.step()
    for name, result in engine.results.items():
        if result.finish_reason is None:
            engine.abort(name)
    engine.run()
    engine.results.clear()
    return alone


def _by_eighth(steps: list[Step], prompt: int, values: list[float]) -> str:
    """Medians; a dash where no part began."""
    parts: list[list[float]] = [[] for _ in range(8)]
    for step, value in zip(steps, values, strict=True):
        parts[min(max(step.start, 0) * 8 // prompt, 7)].append(value)
    return " ".join(f"{np.median(part):7.2f}" if part else "      -" for part in parts)


def _print_fixed(engine: Engine, args: argparse.Namespace, context_cost: float) -> None:
    ends = [args.prompt * eighth // 8 for eighth in range(1, 9)]
    print("part | alone | " + " ".join(f"{end:7d}" for end in ends) + "  ms, by context up to")
    for part in args.parts:
        for _ in range(2):  # the first time compiles
            costs = Costs(context_cost, part)
            alone = measure(engine, costs, args.prompt, args.streams, args.steps)
        steps = [step for step in costs.beside if step.tokens == part]
        took = [step.seconds * 1e3 for step in steps]
        said = [step.predicted * 1e3 for step in steps]
        print(f"{part:4d} | {alone:5.2f} | " + _by_eighth(steps, args.prompt, took))
        print("     |  said | " + _by_eighth(steps, args.prompt, said), flush=True)


def _print_chosen(engine: Engine, args: argparse.Namespace, context_cost: float) -> None:
    print("parts as StepCosts cuts them")
    costs = Costs(context_cost)
    for number in range(1, args.prompts + 1):
        alone = measure(engine, costs, args.prompt, args.streams, args.steps)
        steps = costs.beside
        took = np.array([step.seconds for step in steps]) * 1e3
        said = np.array([step.predicted for step in steps]) * 1e3
        gaps = np.diff([step.ended for step in steps]) * 1e3
        at_most = ", ".join(f"{value:.2f}" for value in np.percentile(took, (50, 99, 100)))
        late = ", ".join(f"{value:.2f}" for value in np.percentile(gaps, (50, 99, 100)))
        print(
            f"prompt {number}: alone {alone:.2f} ms; {len(steps)} steps of {took.sum() / 1e3:.2f} "
            f"s, p50, p99, most {at_most} ms, gaps {late} ms"
        )
        for name, values in (
            ("tokens", [float(step.tokens) for step in steps]),
            ("took", took.tolist()),
            ("said", said.tolist()),
        ):
            print(f"{name:>12} | " + _by_eighth(steps, args.prompt, values), flush=True)
        longest = sorted(steps, key=lambda step: -step.seconds)[:6]
        print("     longest | " + "; ".join(
            f"{s.tokens} at {s.start}: {s.seconds * 1e3:.2f}, said {s.predicted * 1e3:.2f}"
            for s in longest
        ))  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=32_000)
    parser.add_argument("--prompts", type=int, default=3, help="cut by StepCosts")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="of decodes before each prompt")
    parts = [32, 64, 128, 192, 256, 384, 448, 512, 640, 1024, 2048]
    parser.add_argument("--parts", type=int, nargs="*", default=parts)
    args = parser.parse_args()
    engine = Engine(
        args.model, device=args.device, dtype=args.dtype, load_format=args.load_format,
        skip_tokenizer_init=True, enable_prefix_caching=False,
        max_model_len=args.prompt + 1024, max_num_seqs=args.streams + 1,
    )  # fmt: skip
    kept = engine.core.scheduler._costs
    assert kept is not None
    context_cost = kept._context_cost
    print(f"a token weighs twice as much at a context of {1 / context_cost:.0f}")
    _print_fixed(engine, args, context_cost)
    _print_chosen(engine, args, context_cost)
    engine.close()


if __name__ == "__main__":
    main()
