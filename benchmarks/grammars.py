# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Structured output on a real model: is it valid, does it end, and what does it cost.

    python -m benchmarks.grammars [--model M] [--schemas 240] [--tokens 64]

Prints, for random schemas of growing difficulty at temperature 1, how many were accepted, finished
and valid by `jsonschema`, and tokens a second with and without a grammar at batch 1, 8 and 32, with
the user CPU time that a step costs in all processes: other work on the machine does not show there.
"""

import argparse
import json
import random
import time
from collections import Counter

import jsonschema
import psutil

from llmserve import LLM, SamplingParams, StructuredOutputsParams
from llmserve.errors import RequestError
from tests.helpers.grammar import random_schema

MAX_TOKENS = 400
LIST = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"enum": ["Rome", "Oslo", "Lima"]},
        },
        "required": ["name", "age", "city"],
    },
}


def judge(llm: LLM, count: int) -> Counter[str]:
    """Every schema once, strictly, all at the same time."""
    rng, found = random.Random(0), Counter[str]()
    schemas = [random_schema(rng, index * 4 // count) for index in range(count)]
    prompts = [f"JSON for the schema {json.dumps(schema)[:300]}:\n" for schema in schemas]
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
            max_tokens=MAX_TOKENS,
            seed=seed,
        )
        for seed, schema in enumerate(schemas)
    ]
    for schema, output in zip(schemas, llm.generate(prompts, params), strict=True):
        found["accepted"] += 1
        (one,) = output.outputs
        if one.finish_reason != "stop":
            found["unfinished"] += 1
            continue
        found["finished"] += 1
        found["valid"] += jsonschema.Draft202012Validator(schema).is_valid(json.loads(one.text))
    return found


def user_seconds() -> float:
    """Of this process and all that it has started."""
    own = psutil.Process()
    return sum(one.cpu_times().user for one in [own, *own.children(recursive=True)])


def rate(
    llm: LLM, batch: int, tokens: int, asked: StructuredOutputsParams | None
) -> tuple[float, float]:
    """Tokens a second of `batch` requests with the same prompt, and user ms a step."""
    params = [
        SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, structured_outputs=asked)
        for seed in range(batch)
    ]
    used, began = user_seconds(), time.perf_counter()
    llm.generate(["List some people as JSON:"] * batch, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return batch * tokens / seconds, (user_seconds() - used) * 1000 / tokens


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--schemas", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for backend in ("auto", "guidance"):
        config = {"backend": backend}
        with LLM(
            args.model, load_format=args.load_format, max_model_len=2048,
            structured_outputs_config=config,
        ) as llm:  # fmt: skip
            if backend == "auto" and args.schemas:
                print(dict(judge(llm, args.schemas)), flush=True)
            asked = StructuredOutputsParams(json=LIST)
            rate(llm, 1, 4, asked)  # compiles
            for batch in (1, 8, 32):
                free, bound = [], []
                for _ in range(args.rounds):  # by turns: others use the machine too
                    free.append(rate(llm, batch, args.tokens, None))
                    bound.append(rate(llm, batch, args.tokens, asked))
                (free_rate, bound_rate) = (max(r for r, _ in runs) for runs in (free, bound))
                (free_cpu, bound_cpu) = (min(c for _, c in runs) for runs in (free, bound))
                print(f"{backend} batch {batch}: {free_rate:.0f} tok/s free, {bound_rate:.0f} "
                      f"bound, {bound_rate / free_rate:.2f} x; {free_cpu:.1f} and "
                      f"{bound_cpu:.1f} user ms a step", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except RequestError as error:
        raise SystemExit(error.message) from None
