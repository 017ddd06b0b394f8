# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gaps between the tokens of streams, alone and beside long prompts, of any OpenAI server.

    python benchmarks/decode_gaps.py URL [--streams 8] [--prompt 32000] [--prompts 3]

Streams of short random prompts decode without end; long ones with one token to answer come one
after the other. A gap counts as beside a prompt if it ends between its sending and its token.
"""

import argparse
import asyncio
import itertools
import random
import time

import httpx
import numpy as np


async def _run(client: httpx.AsyncClient, streams: int, length: int, prompts: int) -> None:
    model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
    draw = random.Random(1)
    arrivals: list[list[float]] = [[] for _ in range(streams)]

    def body(length: int, max_tokens: int) -> dict[str, object]:
        return {
            "model": model, "prompt": [draw.randrange(100, 900) for _ in range(length)],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip

    async def decode(times: list[float]) -> None:
        while True:
            request = client.stream("POST", "/v1/completions", json=body(100, 1000))
            async with request as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith('data: {"') and '"choices":[{' in line.replace(": ", ":"):
                        times.append(time.perf_counter())
            times.append(0.0)  # between two answers there is no gap

    async def settle() -> None:
        """Until each stream has had 30 tokens more."""
        wanted = [len(times) + 30 for times in arrivals]
        while any(len(times) < n for times, n in zip(arrivals, wanted, strict=True)):
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(decode(times)) for times in arrivals]
    spans = []
    await settle()
    for _ in range(prompts):
        began = time.perf_counter()
        await settle()
        await settle()
        sent = time.perf_counter()
        (await client.post("/v1/completions", json=body(length, 1) | {"stream": False})
         ).raise_for_status()  # fmt: skip
        spans.append((began, sent, time.perf_counter()))
        await settle()
    for task in tasks:
        task.cancel()
    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    for first, second in itertools.chain.from_iterable(map(itertools.pairwise, arrivals)):
        for began, sent, answered in spans:
            if first and began < second <= sent:
                gaps["alone"].append(second - first)
            elif first and sent < second <= answered:
                gaps["beside"].append(second - first)
    late = {}
    for name, found in gaps.items():
        p50, p99 = np.percentile(found, (50, 99)) * 1e3
        late[name] = p99
        print(f"{name:6}: p50 {p50:8.2f} ms, p99 {p99:8.2f} ms, {len(found)} gaps")
    waited = [answered - sent for _, sent, answered in spans]
    print(f"p99 beside / alone {late['beside'] / late['alone']:.2f}")
    print("seconds to the token of the long prompts: " + ", ".join(f"{s:.2f}" for s in waited))


async def _main(url: str, streams: int, length: int, prompts: int) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await _run(client, streams, length, prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32_000)
    parser.add_argument("--prompts", type=int, default=3)
    args = parser.parse_args()
    asyncio.run(_main(args.url, args.streams, args.prompt, args.prompts))
