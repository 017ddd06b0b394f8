# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Many mixed requests against one server, and whether anything grows.

A fifth of them are aborted, a tenth are wrong; ids, salts, stop strings and schemas are never the
same twice; the median answer is 32 tokens long. Of every process the resident memory and the
descriptors are read twenty times. The first tenth (of the full run: 20,000) is warm-up, in which so
many schemas are sent that the cache of grammars is full: from then on one goes for each that comes.

    python -m benchmarks.soak [--requests 200000] [--concurrency 24] [--seed 0] [--schemas 0.05]

Exit code 1 where memory grows by 1 MB or more per 10,000 requests, where a descriptor, a thread, a
process or a KV block is lost, or where an answer was not what its request asked for. Latency is
reported: p99 of the last quarter over that of the first after the warm-up.
"""

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import uvloop

from tests.helpers.faults import Bench, write_bench_model
from tests.helpers.invariants import Snapshot, check_blocks, check_leaks

SAMPLES = 20
MAX_SLOPE = 1.0  # MB per 10,000 requests, all processes together
ABORTS, ERRORS = 0.2, 0.1
CACHED = 4400  # grammars, a few more than there is room for
_WIDTH = 300  # token ids of prompts


@dataclass
class Soak:
    """One run: what is still to send, and what came of the rest."""

    bench: Bench
    total: int
    rng: random.Random
    schemas: float  # their share, after the warm-up
    warm: int
    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    times: list[tuple[int, float]] = field(default_factory=list)  # (number, seconds)
    samples: list[tuple[int, Snapshot]] = field(default_factory=list)

    def body(self, number: int) -> dict[str, Any]:
        """A good request that no other one equals."""
        rng = self.rng
        body: dict[str, Any] = {
            "prompt": [*rng.choices(range(_WIDTH), k=min(600, int(rng.lognormvariate(3, 1))) + 1)],
            "max_tokens": max(1, min(400, int(rng.lognormvariate(math.log(32), 0.6)))),
            "ignore_eos": True,
            "stream": rng.random() < 0.5,
            "temperature": rng.choice((0.0, 0.7, 1.0)),
            "request_id": f"soak-{number}",
        }
        if rng.random() < 0.5:
            body["cache_salt"] = f"salt-{number}"
        if rng.random() < 0.3:
            body["stop"] = [f"stop {number}", f"{number} pots"]
        if rng.random() < 0.1:
            body["logprobs"] = rng.randrange(5)
        schemas = self.schemas
        if number <= self.warm:
            schemas = min(1.0, CACHED / self.warm) if schemas else 0.0
        if rng.random() < schemas:
            schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"}}}
            body["response_format"] = {
                "type": "json_schema", "json_schema": {"name": f"s{number}", "schema": schema},
            }  # fmt: skip
        return body

    def spoil(self, body: dict[str, Any], number: int) -> None:
        """Makes it a bad one."""
        wrong: list[dict[str, Any]] = [
            {"prompt": [5, 10**6 + number]}, {"temperature": -1}, {"max_tokens": -number - 1},
            {"model": f"none-{number}"}, {"prompt": [1] * 3000}, {"logit_bias": {"999999": 1}},
            {"n": 0}, {"cache_salt": "s" * 200},
        ]  # fmt: skip
        body |= self.rng.choice(wrong)

    async def worker(self) -> None:
        """Sends until all are sent."""
        parts = urlsplit(self.bench.server.url)
        while self.sent < self.total:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                for _ in range(self.rng.randrange(1, 200)):
                    if self.sent >= self.total or not await self.one(reader, writer):
                        break
            finally:
                writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection may serve another."""
        self.sent += 1
        number, rng = self.sent, self.rng
        body, kind = self.body(number), rng.random()
        if kind < ERRORS:
            self.spoil(body, number)
        aborts = ERRORS <= kind < ERRORS + ABORTS
        data = json.dumps(body).encode()
        began = time.monotonic()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (self.bench.keys[number % 2].encode(), len(data))
        )
        if aborts and rng.random() < 0.1:
            writer.write(data[: len(data) // 2])
            self.outcomes["aborted"] += 1
            return False
        writer.write(data)
        if aborts:
            await asyncio.sleep(rng.expovariate(20))
            self.outcomes["aborted"] += 1
            return False
        status, answer = await asyncio.wait_for(read_answer(reader), 120)
        expected = 404 if "none-" in str(body.get("model")) else 400 if kind < ERRORS else 200
        self.outcomes[str(status)] += 1
        ended = status != 200 or b"[DONE]" in answer or not body["stream"]
        if status != expected or not ended:
            self.wrong.append(f"request {number}: {status}, not {expected}: {answer[:200]!r}")
        elif status == 200:
            self.times.append((number, time.monotonic() - began))
        return True

    async def run(self, concurrency: int) -> None:
        """All of it, with samples on the way."""
        workers = [asyncio.create_task(self.worker()) for _ in range(concurrency)]
        step = max(1, self.total // SAMPLES)
        while not all(worker.done() for worker in workers):
            await asyncio.sleep(0.05)
            if self.sent >= step * (len(self.samples) + 1):
                self.samples.append((self.sent, await asyncio.to_thread(self.bench.snapshot)))
        await asyncio.gather(*workers)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer."""
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    if b"content-length" in headers:
        return status, await reader.readexactly(int(headers[b"content-length"]))
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return status, body


def rss_mb(snapshot: Snapshot) -> float:
    """Of all processes."""
    return sum(snapshot.rss.values()) / 2**20


def slope_per_10k(samples: list[tuple[int, Snapshot]], warm: int) -> float:
    """MB per 10,000 requests, by least squares over the samples after the warm-up."""
    after = [(number, rss_mb(snapshot)) for number, snapshot in samples if number > warm]
    x, y = np.array(after).T
    return float(np.polyfit(x, y, 1)[0] * 10_000)


def p99(times: list[tuple[int, float]], low: float, high: float) -> float:
    """Seconds, of the requests numbered from `low` to `high`."""
    return float(np.percentile([took for number, took in times if low < number <= high], 99))


def report(soak: Soak, before: Snapshot, after: Snapshot, blocks: list[str], took: float) -> int:
    """Prints the figures; the exit code."""
    warm = soak.warm
    slope = slope_per_10k(soak.samples, warm)
    span = soak.total - warm
    first = p99(soak.times, warm, warm + span / 4)
    last = p99(soak.times, soak.total - span / 4, soak.total)
    before.threads |= next(sample.threads for number, sample in soak.samples if number > warm)
    leaks = check_leaks(before, after, 1 << 40)  # pools of threads are full by then
    print(f"{soak.total} requests in {took:.0f} s: {dict(sorted(soak.outcomes.items()))}")
    print("| requests | " + " | ".join(sorted(before.rss)) + " | descriptors | threads |")
    for number, sample in [(0, before), *soak.samples, (soak.total, after)]:
        sizes = " | ".join(f"{sample.rss[name] / 2**20:.1f}" for name in sorted(before.rss))
        print(
            f"| {number} | {sizes} | {sum(sample.fds.values())} | {sum(sample.threads.values())} |"
        )
    print(f"RSS slope after {warm}: {slope:+.2f} MB per 10k requests (limit {MAX_SLOPE})")
    print(f"p99 {first:.3f} s, then {last:.3f} s ({100 * (last / first - 1):+.0f} %)")
    for line in [*blocks, *leaks, *soak.wrong[:20]]:
        print(line)
    return int(bool(blocks or leaks or soak.wrong) or slope >= MAX_SLOPE)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemas", type=float, default=0.05, help="their share")
    args = parser.parse_args()
    flags = ("--disable-uvicorn-access-log", "--max-requests-per-key", "0")
    with (
        tempfile.TemporaryDirectory() as folder,
        Bench(write_bench_model(Path(folder)), *flags) as bench,
    ):
        asked = {"prompt": "x", "max_tokens": 1, "response_format": {"type": "json_object"}}
        assert bench.http.post("/v1/completions", json=asked).status_code == 200
        warm = max(args.requests // 10, min(20_000, args.requests // 2))
        soak = Soak(bench, args.requests, random.Random(args.seed), args.schemas, warm)
        before, began = bench.snapshot(), time.monotonic()
        uvloop.run(soak.run(args.concurrency))
        took = time.monotonic() - began
        bench.check_idle(30.0)
        time.sleep(1.0)
        return report(soak, before, bench.snapshot(), check_blocks(bench.server.metrics()), took)


if __name__ == "__main__":
    sys.exit(main())
