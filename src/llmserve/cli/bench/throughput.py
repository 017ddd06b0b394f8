# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve bench throughput`: all prompts at once, without HTTP."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from llmserve.cli.args import parse_flags, take
from llmserve.cli.bench.latency import random_prompts, vocab_size
from llmserve.config.engine import ENGINE_GROUPS
from llmserve.config.flag import check_all, flag, positive
from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.llm import LLM


@dataclass(frozen=True)
class ThroughputBench:
    """The prompts."""

    input_len: int = flag(128, "Tokens of each prompt.", check=positive)
    output_len: int = flag(128, "Tokens generated for each.", check=positive)
    num_prompts: int = flag(64, "Number of prompts.", check=positive)
    output_json: str | None = flag(None, "File for the numbers.")

    def __post_init__(self) -> None:
        check_all(self)


def run(argv: list[str]) -> int:
    """Prints requests and tokens a second."""
    flags = parse_flags(
        argv, (ThroughputBench, *ENGINE_GROUPS), prog="llmserve bench throughput",
        description="Tokens a second when all prompts are given at once.",
    )  # fmt: skip
    options = take(flags, ThroughputBench)
    size = vocab_size(flags)
    llm = LLM(**flags)
    params = SamplingParams(
        temperature=1.0, ignore_eos=True, max_tokens=options.output_len, detokenize=False
    )
    warmup = params.clone(max_tokens=2)
    llm.generate(random_prompts(size, [options.input_len] * 2, 1), warmup, use_tqdm=False)
    prompts = random_prompts(size, [options.input_len] * options.num_prompts, 0)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - start
    tokens_in = options.input_len * len(prompts)
    tokens_out = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    total = tokens_in + tokens_out
    print(
        f"Throughput: {len(prompts) / elapsed:.2f} requests/s, "
        f"{total / elapsed:.2f} total tokens/s, {tokens_out / elapsed:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {tokens_in}")
    print(f"Total num output tokens:  {tokens_out}")
    if options.output_json:
        record = {
            "elapsed_time": elapsed,
            "num_requests": len(prompts),
            "total_num_tokens": total,
            "requests_per_second": len(prompts) / elapsed,
            "tokens_per_second": total / elapsed,
        }
        Path(options.output_json).write_text(json.dumps(record, indent=2))
    return 0
