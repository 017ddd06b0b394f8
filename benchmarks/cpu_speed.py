# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Decode speed on the CPU beside transformers' `generate`: same file, dtype, threads and batch.

Prints output tokens/s (prefill of a 32-token prompt included) and the ratio, best of `--repeat`
alternating runs. `--peer URL` adds a server that speaks the OpenAI completions API, such as
llama.cpp's with the same GGUF file and `-t` equal to `--threads`.
"""

import argparse
import concurrent.futures
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from llmserve import LLM, SamplingParams
from llmserve.config.hf import describe
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig

PROMPT_LEN, OUTPUT_LEN = 32, 96


def _rate(run: Callable[[int], None], batch: int) -> float:
    began = time.perf_counter()
    run(batch)
    return batch * OUTPUT_LEN / (time.perf_counter() - began)


def _prompts(batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(int(time.time_ns() % 2**31))
    return torch.randint(100, 40_000, (batch, PROMPT_LEN), generator=generator).tolist()


def _transformers(path: Path, dtype: torch.dtype) -> Callable[[int], None]:
    # Left packed, weights would be multiplied by other kernels, in float32 whatever the dtype.
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    assert all(parameter.dtype == dtype for parameter in model.parameters())

    def run(batch: int) -> None:
        ids = torch.tensor(_prompts(batch))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_LEN,
            min_new_tokens=OUTPUT_LEN,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape == (batch, PROMPT_LEN + OUTPUT_LEN)

    return run


def _llmserve(model: str, dtype: str, threads: int) -> Callable[[int], None]:
    llm = LLM(model=model, dtype=dtype, cpu_threads=threads, enable_prefix_caching=False)
    params = SamplingParams(
        temperature=0.0, max_tokens=OUTPUT_LEN, ignore_eos=True, detokenize=False
    )

    def run(batch: int) -> None:
        outputs = llm.generate(_prompts(batch), params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == OUTPUT_LEN for output in outputs)

    return run


def _server(url: str) -> Callable[[int], None]:
    def one(ids: list[int]) -> None:
        body = {"prompt": ids, "max_tokens": OUTPUT_LEN, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            assert json.load(response)["usage"]["completion_tokens"] == OUTPUT_LEN

    def run(batch: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(batch) as pool:
            list(pool.map(one, _prompts(batch)))

    return run


def main() -> None:
    """Runs the comparison for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="a .gguf file; default is the demo model")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", help="base URL of another server, measured in the same turns")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = Path(describe(ModelConfig(model=args.model), LoadConfig()).source.path)
    for dtype in args.dtype:
        runs = {
            "transformers": _transformers(path, getattr(torch, dtype)),
            "llmserve": _llmserve(args.model, dtype, args.threads),
        }
        if args.peer:
            runs["peer"] = _server(args.peer)
        for batch in args.batch:
            best = dict.fromkeys(runs, 0.0)
            for _ in range(args.repeat):
                for name, run in runs.items():
                    best[name] = max(best[name], _rate(run, batch))
            rates = "  ".join(f"{name} {rate:7.1f}" for name, rate in best.items())
            ratio = best["llmserve"] / best["transformers"]
            print(f"{dtype} batch {batch}: {rates} tok/s; ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
