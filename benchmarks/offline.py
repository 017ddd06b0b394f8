# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Offline rates of vLLM or llmserve by the `LLM` interface that both have, on dummy weights.

    python -m benchmarks.offline run ENGINE SHAPE RESULTS     appends to RESULTS what is not in it
    python -m benchmarks.offline long ENGINE SHAPE RESULTS    the same for contexts of 32k
    python -m benchmarks.offline table RESULTS                both engines side by side

bfloat16, greedy unless the workload says otherwise, random prompts, no prefix cache; the best of
two runs. A result is one JSON line with the card and the engine's version, so an interrupted run
goes on where it stopped. Long contexts count without the time of their prompts.
"""

import argparse
import importlib
import importlib.metadata
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500000.0}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1e6}


def _shape(base: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
    common = {
        "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "sliding_window": None,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return base | common | dict(zip(names, sizes.pop("of"), strict=True)) | sizes


SHAPES = {
    "qwen3-0.6b": _shape(
        _QWEN3, of=(1024, 3072, 28, 16, 8, 128, 151_936), tie_word_embeddings=True
    ),
    "llama-8b": _shape(_LLAMA, of=(4096, 14336, 32, 32, 8, 128, 128_256)),
    "llama-1b": _shape(_LLAMA, of=(2048, 8192, 16, 32, 8, 64, 128_256), tie_word_embeddings=True),
    "qwen3-4b": _shape(_QWEN3, of=(2560, 9728, 36, 32, 8, 128, 151_936), tie_word_embeddings=True),
    "mistral-7b": _shape(_MISTRAL, of=(4096, 14336, 32, 32, 8, 128, 32_768)),
    "tiny": _shape(_LLAMA, of=(64, 128, 2, 4, 2, 16, 1_000)),
}


def _uniform(seed: int) -> tuple[list[int], list[int]]:
    draw = random.Random(seed)
    ins = [draw.randint(100, 1024) for _ in range(256)]
    return ins, [draw.randint(100, 1024) for _ in range(256)]


class Workload(NamedTuple):
    """Lengths of prompts and answers, and what counts: input, output, or output once the prompts
    are computed. `sampling` is of row i, fields of SamplingParams."""

    ins: list[int]
    outs: list[int]
    counts: str = "output"
    sampling: Callable[[int], dict[str, Any]] = lambda row: {}


_SAMPLED = {
    "sampled": lambda row: {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": row},
    "penalties": lambda row: {
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1
    },
    "5 logprobs": lambda row: {"logprobs": 5},
}  # fmt: skip
WORKLOADS = {
    **{f"b{n} in128 out256": Workload([128] * n, [256] * n) for n in (1, 8, 64, 256)},
    "prefill 32 x 2048": Workload([2048] * 32, [1] * 32, "input"),
    "mix of 256, 100-1024": Workload(*_uniform(0)),
    **{f"b256 in128 out256, {name}": Workload([128] * 256, [256] * 256, "output", sampling)
       for name, sampling in _SAMPLED.items()},
    **{f"b{n} in128 out256": Workload([128] * n, [256] * n) for n in (3, 17, 100, 200)},
    **{f"b8 in{n} out128": Workload([n] * 8, [128] * 8) for n in (1024, 3900)},
}  # fmt: skip
LONG = {
    f"b{rows} at {context}": Workload([context] * rows, [129] * rows, "decode")
    for context in (16_384, 32_768)
    for rows in (1, 8)
}
SMOKE = {
    "b2 in8 out4": Workload([8] * 2, [4] * 2),
    "prefill 2 x 16": Workload([16] * 2, [1] * 2, "input"),
    "b2 in8 out4, 5 logprobs": Workload([8] * 2, [4] * 2, "output", _SAMPLED["5 logprobs"]),
    "b2 at 40": Workload([40] * 2, [9] * 2, "decode"),
}


def run(engine: str, shape: str, results: Path, workloads: dict[str, Workload]) -> None:
    """Runs the workloads that `results` has not."""
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(r["engine"], r["shape"], r["workload"]) for r in map(json.loads, lines)}
    todo = {name: w for name, w in workloads.items() if (engine, shape, name) not in done}
    if not todo:
        return
    config = SHAPES[shape]
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    (folder / "config.json").write_text(json.dumps(config))
    module = importlib.import_module(engine)
    began = time.perf_counter()
    longest = max(i + o for w in workloads.values() for i, o in zip(w.ins, w.outs, strict=True))
    llm = module.LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True,
        max_model_len=longest + 64,
        gpu_memory_utilization=0.85, enable_prefix_caching=False, max_num_seqs=512,
        max_num_batched_tokens=16384, disable_log_stats=True,
    )  # fmt: skip
    start = time.perf_counter() - began
    draw = random.Random(1)

    def once(ins: list[int], outs: list[int], sampling: Callable[[int], dict[str, Any]]) -> float:
        prompts = [
            {"prompt_token_ids": [draw.randrange(10, config["vocab_size"]) for _ in range(n)]}
            for n in ins
        ]
        params = [
            module.SamplingParams(
                **{"temperature": 0.0, "ignore_eos": True, "max_tokens": n, "detokenize": False}
                | sampling(row)
            )
            for row, n in enumerate(outs)
        ]
        began = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        assert sum(len(a.outputs[0].token_ids) for a in answers) == sum(outs)
        return seconds

    def best(ins: list[int], outs: list[int], sampling: Callable[[int], dict[str, Any]]) -> float:
        return min(once(ins, outs, sampling) for _ in range(2))

    once([16] * 4, [8] * 4, lambda row: {})
    with results.open("a") as file:
        for name, (ins, outs, counts, sampling) in todo.items():
            seconds, tokens = best(ins, outs, sampling), sum(ins if counts == "input" else outs)
            if counts == "decode":
                seconds -= best(ins, [1] * len(ins), sampling)
                tokens -= len(ins)
            record = {
                "engine": engine, "version": version(engine), "shape": shape,
                "workload": name, "card": card(),
                "tok_s": round(tokens / seconds, 1),
                "seconds": round(seconds, 4), "start_s": round(start, 1),
            }  # fmt: skip
            print(json.dumps(record), file=file, flush=True)


def card() -> str:
    """By the driver: to ask torch would take memory from who is measured."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except OSError:
        return "CPU"
    return names.splitlines()[0]


def version(engine: str) -> str:
    """As installed, or of a source tree."""
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module(engine).__version__)


# Records of other fields than tok_s: the ratio is a share of vLLM's time
_TIMES = {"ttft_p99_ms": "TTFT p99, ms", "tpot_p50_ms": "TPOT p50, ms"}


def table(results: Path) -> None:
    """Rates, times and ratios; rows that one engine has alone are left out."""
    rates: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for record in map(json.loads, results.read_text().splitlines()):
        row = (record["card"], record["shape"], record["workload"])
        rates.setdefault(row, {})[record["engine"]] = record
    print("| card | shape | workload | vllm tok/s | llmserve tok/s | ratio |")
    print("|---|---|---|---|---|---|")
    for (name, shape, workload), by in rates.items():
        if len(by) < 2:
            continue
        ours, theirs = by["llmserve"], by["vllm"]
        greedy = rates.get((name, shape, workload.split(", ")[0]))
        if greedy and greedy is not by:
            shares = [one["tok_s"] / greedy[one["engine"]]["tok_s"] for one in (theirs, ours)]
            workload += " ({:.2f} and {:.2f} of greedy)".format(*shares)
        rows = [("tok_s", workload)]
        rows += [(key, f"{workload}: {text}") for key, text in _TIMES.items() if key in ours]
        for key, text in rows:
            print(
                f"| {name} | {shape} | {text} | {theirs[key]:,} | {ours[key]:,} "
                f"| {ours[key] / theirs[key]:.2f} |"
            )
    versions = {f"{r['engine']} {r['version']}" for by in rates.values() for r in by.values()}
    print("\n" + ", ".join(sorted(versions)))


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "long"):
        runs = commands.add_parser(name)
        runs.add_argument("engine", choices=("vllm", "llmserve"))
        runs.add_argument("shape", choices=SHAPES)
        runs.add_argument("results", type=Path)
    commands.add_parser("table").add_argument("results", type=Path)
    args = parser.parse_args()
    if args.command == "table":
        table(args.results)
        return
    workloads = {"run": WORKLOADS, "long": LONG}[args.command]
    run(args.engine, args.shape, args.results, SMOKE if args.shape == "tiny" else workloads)


if __name__ == "__main__":
    main()
