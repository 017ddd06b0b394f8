# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve bench latency`: one batch, again and again, without HTTP."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llmserve.cli.args import parse_flags, take
from llmserve.cli.bench.step_profile import profile_decode
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.flag import check_all, flag, not_negative, positive
from llmserve.config.hf import describe
from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.input_processor import TokensPrompt
from llmserve.frontend.llm import LLM
from llmserve.models.common import Fields
from llmserve.models.registry import MODELS

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class LatencyBench:
    """The batch."""

    input_len: int = flag(32, "Tokens of each prompt.", check=positive)
    output_len: int = flag(128, "Tokens generated for each.", check=positive)
    batch_size: int = flag(8, "Prompts in the batch.", check=positive)
    num_iters_warmup: int = flag(3, "Rounds before the clock starts.", check=not_negative)
    num_iters: int = flag(10, "Rounds measured.", check=positive)
    output_json: str | None = flag(None, "File for the numbers.")
    profile: bool = flag(
        False, "Instead, print by kernel where the time of a decode step goes, and its floor."
    )

    def __post_init__(self) -> None:
        check_all(self)


def random_prompts(vocab_size: int, lengths: list[int], seed: int) -> list[TokensPrompt]:
    """Prompts of random token ids, one for each length."""
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.randrange(vocab_size) for _ in range(length)]}
        for length in lengths
    ]


def vocab_size(flags: dict[str, Any]) -> int:
    """The model's vocabulary, from its config alone."""
    config = EngineConfig.from_flags(**flags)
    description = describe(config.model, config.load)
    decoder = MODELS.load(description.architecture).read(Fields(description.hf_config))
    return int(decoder.vocab_size)


def run(argv: list[str]) -> int:
    """Prints the mean and the percentiles of a batch's seconds."""
    flags = parse_flags(
        argv, (LatencyBench, *ENGINE_GROUPS), prog="llmserve bench latency",
        description="Seconds of one batch from submission to its last token.",
    )  # fmt: skip
    options = take(flags, LatencyBench)
    flags = {"enable_prefix_caching": False} | flags  # rounds repeat their prompts
    size = vocab_size(flags)
    prompts = random_prompts(size, [options.input_len] * options.batch_size, 0)
    if options.profile:
        print(profile_decode(flags, [prompt["prompt_token_ids"] for prompt in prompts]))
        return 0
    llm = LLM(**flags)
    params = SamplingParams(
        temperature=1.0, ignore_eos=True, max_tokens=options.output_len, detokenize=False
    )
    latencies = []
    for number in tqdm(range(-options.num_iters_warmup, options.num_iters), desc="rounds"):
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if number >= 0:
            latencies.append(time.perf_counter() - start)
    percentiles = np.percentile(latencies, PERCENTILES).tolist()
    print(f"Avg latency: {np.mean(latencies)} seconds")
    for percentage, value in zip(PERCENTILES, percentiles, strict=True):
        print(f"{percentage}% percentile latency: {value} seconds")
    if options.output_json:
        record = {
            "avg_latency": float(np.mean(latencies)),
            "latencies": latencies,
            "percentiles": dict(zip(map(str, PERCENTILES), percentiles, strict=True)),
        }
        Path(options.output_json).write_text(json.dumps(record, indent=2))
    return 0
