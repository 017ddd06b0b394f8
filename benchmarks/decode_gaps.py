# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gaps between the tokens of streams, alone and beside long prompts, of any OpenAI server.

    python benchmarks/decode_gaps.py URL [--streams 8] [--prompt 32000] [--prompts 3]

Streams of short random prompts decode without end, read by a process of their own; long ones with
one token to answer come one after the other. A gap is the time between two pieces of an answer, and
counts as beside a prompt if it ends between the prompt's sending and its token. A stream whose
answer ends beside a prompt waits behind it, and where all wait, nobody is held up any more and the
prompt runs as if it were alone: answers are long, end by turns, and those that do are counted.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import time
import urllib.request
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import numpy as np

_PAUSE_S = 1.0  # before each prompt, for the gaps without


def _body(model: str, length: int, max_tokens: int, draw: random.Random) -> bytes:
    return json.dumps(
        {
            "model": model, "prompt": [draw.randrange(100, 900) for _ in range(length)],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": max_tokens > 1,
        }
    ).encode()  # fmt: skip


async def _stream(host: str, port: int, first: bytes, others: bytes, arrivals: list[float]) -> None:
    """Again and again; a 0 stands between two answers, where there is no gap."""
    body = first
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    while True:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r"
            b"\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
            arrivals.append(time.monotonic())
        await reader.readline()
        arrivals.append(0.0)
        body = others


async def _streams(url: str, model: str, count: int, tokens: int, end: Connection) -> None:
    parts, draw = urlsplit(url), random.Random(1)
    assert parts.hostname and parts.port
    arrivals: list[list[float]] = [[] for _ in range(count)]
    tasks = []
    for number, mine in enumerate(arrivals, 1):
        length = max(tokens * number // count, 2)
        first, others = (_body(model, 100, most, draw) for most in (length, tokens))
        stream = _stream(parts.hostname, parts.port, first, others, mine)
        tasks.append(asyncio.create_task(stream))
    await asyncio.get_running_loop().run_in_executor(None, end.recv)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    end.send(arrivals)


def _decode(url: str, model: str, count: int, tokens: int, end: Connection) -> None:
    asyncio.run(_streams(url, model, count, tokens, end))


def run(url: str, streams: int, tokens: int, length: int, prompts: int) -> None:
    """Measures and prints."""
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    draw = random.Random(2)
    bodies = [_body(model, length, 1, draw) for _ in range(prompts)]
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=_decode, args=(url, model, streams, tokens, theirs), daemon=True).start()
    spans = []
    time.sleep(3 * _PAUSE_S)
    for body in bodies:
        began = time.monotonic()
        time.sleep(_PAUSE_S)
        sent = time.monotonic()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        urllib.request.urlopen(request, timeout=600).read()
        spans.append((began, sent, time.monotonic()))
    ours.send(None)
    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    num_ended = 0
    for first, second in itertools.chain.from_iterable(map(itertools.pairwise, ours.recv())):
        for began, sent, answered in spans:
            if first and began < second <= sent:
                gaps["alone"].append(second - first)
            elif first and sent < second <= answered:
                gaps["beside"].append(second - first)
            num_ended += not second and sent < first <= answered
    late = {}
    for name, found in gaps.items():
        p50, late[name], most = np.percentile(found, (50, 99, 100)) * 1e3
        print(
            f"{name:6}: p50 {p50:8.2f} ms, p99 {late[name]:8.2f} ms, longest {most:8.2f} ms, "
            f"{len(found)} gaps"
        )
    waited = [answered - sent for _, sent, answered in spans]
    print(f"p99 beside / alone {late['beside'] / late['alone']:.2f}")
    print(f"{num_ended} answers of {streams} streams ended beside {prompts} prompts")
    print("seconds to the token of the long prompts: " + ", ".join(f"{s:.2f}" for s in waited))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8000, help="of an answer")
    parser.add_argument("--prompt", type=int, default=32_000)
    parser.add_argument("--prompts", type=int, default=3)
    args = parser.parse_args()
    run(args.url, args.streams, args.tokens, args.prompt, args.prompts)
