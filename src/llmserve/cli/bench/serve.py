# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve bench serve`: load on any OpenAI-compatible server, reported as vLLM reports it."""

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from llmserve import envs
from llmserve.cli.args import parse_flags, take
from llmserve.cli.bench import datasets
from llmserve.cli.bench.http import Target, post_events
from llmserve.cli.bench.report import METRICS, Result, details, summarize, table
from llmserve.cli.client import Client
from llmserve.config.flag import check_all, flag, not_negative, positive
from llmserve.errors import ConfigError, LLMServeError

_ENDPOINTS = {
    "vllm": "/v1/completions",
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}


def _above_zero(value: float) -> str | None:
    return None if value > 0 else "must be above 0"


def _ratio(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


@dataclass(frozen=True)
class ServeBench:
    """Server, load and report."""

    backend: str = flag("openai", "Which route.", choices=tuple(_ENDPOINTS))
    base_url: str | None = flag(None, "The server; default is --host and --port.")
    host: str = flag("127.0.0.1", "Where the server is.")
    port: int = flag(8000, "Its port.")
    endpoint: str | None = flag(None, "Route, where it is not the backend's.")
    api_key: str | None = flag(None, "Key of the server; default is LLMSERVE_API_KEY.")
    model: str | None = flag(None, "Model; default is the server's first.")
    dataset_name: str = flag("random", "What is sent.", choices=("random", "custom"))
    dataset_path: str | None = flag(None, 'JSON lines with "prompt", for custom.')
    custom_output_len: int = flag(256, "Tokens asked for, for custom.", check=positive)
    random_input_len: int = flag(1024, "Prompt tokens, for random.", check=positive)
    random_output_len: int = flag(128, "Tokens asked for, for random.", check=positive)
    random_prefix_len: int = flag(0, "Tokens that all prompts share.", check=not_negative)
    random_range_ratio: float = flag(0.0, "Lengths vary by this share.", check=_ratio)
    num_prompts: int = flag(1000, "Number of requests.", check=positive)
    num_warmups: int = flag(0, "Requests before the clock starts.", check=not_negative)
    request_rate: float = flag(math.inf, "Requests a second; inf sends all.", check=_above_zero)
    burstiness: float = flag(1.0, "1 is Poisson, above is more even.", check=_above_zero)
    max_concurrency: int | None = flag(None, "Most requests at once.", check=positive)
    ignore_eos: bool = flag(False, "Generate to the full length.")
    temperature: float | None = flag(None, "Sampling temperature; default is the server's.")
    extra_body: dict[str, Any] = flag({}, "JSON added to every request.")
    seed: int = flag(0, "Seed of prompts and arrivals.")
    goodput: list[str] = flag([], "Limits in ms: ttft:200 tpot:50 e2el:1000.", repeat=True)
    percentile_metrics: str = flag("ttft,tpot,itl", "Of ttft, tpot, itl, e2el.")
    metric_percentiles: str = flag("99", "Percentiles, as in 50,90,99.")
    save_result: bool = flag(False, "Write a JSON file.")
    save_detailed: bool = flag(False, "With an entry for each request.")
    result_dir: str = flag(".", "Folder of the JSON file.")
    result_filename: str | None = flag(None, "Its name.")
    metadata: list[str] = flag([], "KEY=VALUE for the JSON file.", repeat=True)
    disable_tqdm: bool = flag(False, "No progress bar.")
    ready_check_timeout_sec: float = flag(600.0, "Wait for the server.", check=not_negative)

    def __post_init__(self) -> None:
        check_all(self)
        if self.dataset_name == "custom" and not self.dataset_path:
            raise ConfigError("--dataset-name custom needs --dataset-path")
        if self.dataset_name == "random" and self.dataset_path:
            raise ConfigError("--dataset-path needs --dataset-name custom")
        if wrong := [word for word in self.metadata if "=" not in word]:
            raise ConfigError(f"--metadata must look like KEY=VALUE, got {wrong[0]!r}")

    @property
    def metrics(self) -> list[str]:
        """The metrics to report."""
        names = self.percentile_metrics.split(",")
        if unknown := [name for name in names if name not in METRICS]:
            raise ConfigError(
                f"--percentile-metrics must be of {', '.join(METRICS)}, got {unknown[0]!r}"
            )
        return names

    @property
    def percentiles(self) -> list[float]:
        """The percentiles to report."""
        try:
            values = [float(word) for word in self.metric_percentiles.split(",")]
            if all(0 <= value <= 100 for value in values):
                return values
        except ValueError:
            pass
        raise ConfigError(f"--metric-percentiles must be 0 to 100, got {self.metric_percentiles!r}")

    @property
    def limits(self) -> dict[str, float]:
        """`--goodput` as milliseconds by metric."""
        try:
            limits = {k: float(v) for k, _, v in (word.partition(":") for word in self.goodput)}
        except ValueError:
            limits = {"": 0.0}
        if not limits.keys() <= {"ttft", "tpot", "e2el"} or any(v != v for v in limits.values()):
            raise ConfigError(f"--goodput must look like ttft:200 tpot:50, got {self.goodput}")
        return limits


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


async def send(target: Target, body: bytes) -> Result:
    """One request, timed. Its failure is in the result."""
    result = Result(start=time.perf_counter())
    last = result.start
    parts: list[str] = []
    chunks = 0
    try:
        async for data in post_events(target, body):
            now = time.perf_counter()
            chunk = _decode(data)
            if chunk.error is not None:
                raise LLMServeError(str(chunk.error.get("message")))
            if chunk.usage is not None:
                result.prompt_tokens = chunk.usage.prompt_tokens
                result.output_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                delta = choice.delta
                text = choice.text or delta.content or delta.reasoning or delta.reasoning_content
                if not text:
                    continue
                if chunks:
                    result.itls.append(now - last)
                else:
                    result.ttft = now - result.start
                last, chunks = now, chunks + 1
                parts.append(text)
        if not chunks:
            raise LLMServeError("an answer without text")
        result.latency = last - result.start
        result.output_tokens = result.output_tokens or chunks
        result.text = "".join(parts)
        result.success = True
    except (LLMServeError, OSError, ValueError) as error:
        result.error = str(error) or type(error).__name__
    return result


async def arrivals(count: int, rate: float, burstiness: float, seed: int) -> AsyncIterator[int]:
    """0 to `count` - 1, each at its time: gamma intervals of mean 1 / `rate` seconds."""
    draw = random.Random(seed)
    due = time.perf_counter()
    for index in range(count):
        if not math.isinf(rate):
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            due += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        yield index


async def load(
    target: Target, bodies: list[bytes], options: ServeBench
) -> tuple[list[Result], float]:
    """All requests at the asked rate; their results in order, and the seconds it took."""
    gate: contextlib.AbstractAsyncContextManager[Any] = (
        asyncio.Semaphore(options.max_concurrency)
        if options.max_concurrency
        else contextlib.nullcontext()
    )
    with tqdm(total=len(bodies), disable=options.disable_tqdm) as bar:

        async def one(body: bytes) -> Result:
            async with gate:
                result = await send(target, body)
            bar.update()
            return result

        start = time.perf_counter()
        schedule = arrivals(len(bodies), options.request_rate, options.burstiness, options.seed)
        tasks = [asyncio.create_task(one(bodies[index])) async for index in schedule]
        results = await asyncio.gather(*tasks)
        return results, time.perf_counter() - start


def wait_ready(options: ServeBench, client: Client) -> str:
    """The model's name, once the server answers; the last refusal after the timeout."""
    deadline, told = time.monotonic() + options.ready_check_timeout_sec, False
    while True:
        try:
            name = client.model()
            return options.model or name
        except ConfigError:
            raise
        except LLMServeError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                told = True
                seconds = options.ready_check_timeout_sec
                sys.stderr.write(f"waiting up to {seconds:g} s: {error.message}\n")
            time.sleep(0.5)


def samples(options: ServeBench, client: Client, model: str) -> list[datasets.Sample]:
    """The prompts of `--dataset-name`."""
    if options.dataset_path and options.dataset_name == "custom":
        return datasets.custom(options.dataset_path, options.num_prompts, options.custom_output_len)
    drawn = datasets.random_ids(
        datasets.vocabulary_of(client, model), options.num_prompts, options.random_input_len,
        options.random_output_len, options.random_prefix_len, options.random_range_ratio,
        options.seed,
    )  # fmt: skip
    chat = options.backend == "openai-chat"
    return [
        datasets.Sample(datasets.as_text(client, model, ids) if chat else ids, output_len)
        for ids, output_len in drawn
    ]


def request_body(options: ServeBench, model: str, sample: datasets.Sample) -> bytes:
    """One request as JSON."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sample.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": sample.prompt}]
    else:
        body["prompt"] = sample.prompt
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    return json.dumps(body | options.extra_body).encode()


def save(options: ServeBench, model: str, summary: dict[str, Any], results: list[Result]) -> Path:
    """Writes the JSON file; its path."""
    date = time.strftime("%Y%m%d-%H%M%S")
    record: dict[str, Any] = {
        "date": date,
        "endpoint_type": options.backend,
        "backend": options.backend,
        "model_id": model,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    record |= dict(word.split("=", 1) for word in options.metadata) | summary
    if options.save_detailed:
        record |= details(results)
    name = options.result_filename or (
        f"{options.backend}-{options.request_rate:g}qps-{model.rpartition('/')[2]}-{date}.json"
    )
    path = Path(options.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def run(argv: list[str]) -> int:
    """Runs the load, prints the table; exit code 1 where no request succeeded."""
    flags = parse_flags(
        argv, (ServeBench,), prog="llmserve bench serve", model_tag=False, vllm=False,
        description="Load on a running OpenAI-compatible server.",
    )  # fmt: skip
    options = take(flags, ServeBench)
    metrics, percentiles, limits = options.metrics, options.percentiles, options.limits
    base_url = options.base_url or f"http://{options.host}:{options.port}"
    key = options.api_key or envs.API_KEY
    target = Target.make(base_url, options.endpoint or _ENDPOINTS[options.backend], key)
    client = Client(base_url, key)
    if options.save_result or options.save_detailed:  # what cannot be made is said first
        Path(options.result_dir).mkdir(parents=True, exist_ok=True)
    model = wait_ready(options, client)
    bodies = [request_body(options, model, s) for s in samples(options, client, model)]

    async def measure() -> tuple[list[Result], float]:
        if options.num_warmups:
            warmups = [bodies[index % len(bodies)] for index in range(options.num_warmups)]
            await asyncio.gather(*(send(target, body) for body in warmups))
        return await load(target, bodies, options)

    results, duration = asyncio.run(measure())
    summary = summarize(results, duration, metrics, percentiles, limits)
    print(table(summary, metrics, percentiles, options.max_concurrency, options.request_rate))
    if errors := {result.error for result in results if result.error}:
        print(f"{summary['failed']} failed, for example: {min(errors)}")
    if options.save_result or options.save_detailed:
        print(f"saved to {save(options, model, summary, results)}")
    return 0 if summary["completed"] else 1
