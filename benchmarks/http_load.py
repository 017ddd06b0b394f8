# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rates and waiting times of vLLM's or llmserve's server under streamed load, on dummy weights.

    python -m benchmarks.http_load ENGINE SHAPE RESULTS     appends to RESULTS what is not in it

Closed loop: so many streams to /v1/completions, each a random prompt of 128 tokens and 256 tokens
of greedy answer, from several client processes, so that the client is not what is measured. A
stream counts only if its usage names all tokens. `offline table` prints the records.
"""

import asyncio
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models

from benchmarks.offline import SHAPES, card, version

INPUT, OUTPUT = 128, 256
LOADS = {1: 8, 32: 256, 256: 1024}  # streams: requests
CLIENTS = 8  # processes
PORT = 8101
_COMMON = ["--load-format", "dummy", "--max-model-len", "4096", "--gpu-memory-utilization", "0.85",
           "--no-enable-prefix-caching", "--max-num-batched-tokens", "16384", "--max-num-seqs",
           "512", "--port", str(PORT), "--disable-uvicorn-access-log"]  # fmt: skip
_SERVE = {
    "vllm": ["vllm.entrypoints.cli.main", "serve"],
    "llmserve": ["llmserve", "serve"],
}


def make_model(shape: str) -> Path:
    """A folder with the shape's config and a tokenizer of as many words."""
    folder = Path(tempfile.mkdtemp(prefix="shape-"))
    config = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"word{i} ": i for i in range(config["vocab_size"])}))
    words.decoder = decoders.Fuse()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


async def _stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
) -> tuple[float, float]:
    """Seconds to the first token and from it to the last."""
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    began, first, last, events = time.perf_counter(), 0.0, 0.0, b""
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.split(b"\r\n")[0], head
    while size := int(await reader.readline(), 16):
        events += (await reader.readexactly(size + 2))[:-2]
        last = time.perf_counter()
        # An event of no text, as one that only names the role, is no token
        if not first and b'"text":"w' in events.replace(b'"text": "', b'"text":"'):
            first = last
    await reader.readline()
    usage = json.loads(events.split(b"data: ")[-2])["usage"]
    assert usage["completion_tokens"] == OUTPUT and first, events[-300:]
    return first - began, last - first


async def _streams(vocab: int, seed: int, streams: int, requests: int) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    todo = iter(range(requests))
    done = []

    async def one_after_another() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 20)
        for _ in todo:
            prompt = [draw.randrange(10, vocab) for _ in range(INPUT)]
            body = {
                "model": "m", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            done.append(await _stream(reader, writer, json.dumps(body).encode()))
        writer.close()

    await asyncio.gather(*(one_after_another() for _ in range(streams)))
    return done


def _client(job: tuple[int, int, int, int]) -> list[tuple[float, float]]:
    return asyncio.run(_streams(*job))


def load(vocab: int, streams: int, requests: int) -> dict[str, float]:
    """One load; tokens a second, and milliseconds."""
    processes = min(CLIENTS, streams)
    jobs = [(vocab, seed, streams // processes, requests // processes) for seed in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(abs, range(processes))  # all are up
        began = time.perf_counter()
        done = np.array(sum(pool.map(_client, jobs, chunksize=1), []))
        seconds = time.perf_counter() - began
    ttft, tpot = 1000 * done[:, 0], 1000 * done[:, 1] / (OUTPUT - 1)
    return {
        "tok_s": round(len(done) * OUTPUT / seconds, 1),
        "ttft_p50_ms": round(float(np.percentile(ttft, 50)), 2),
        "ttft_p99_ms": round(float(np.percentile(ttft, 99)), 2),
        "tpot_p50_ms": round(float(np.percentile(tpot, 50)), 3),
        "tpot_p99_ms": round(float(np.percentile(tpot, 99)), 3),
    }


def _wait(server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the server ended with {server.returncode}")


def main() -> None:
    """See the module's first lines."""
    engine, shape, results = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(r["engine"], r["shape"], r["workload"]) for r in map(json.loads, lines)}
    names = {f"HTTP {n} streams in{INPUT} out{OUTPUT}": n for n in LOADS}
    todo = {name: n for name, n in names.items() if (engine, shape, name) not in done}
    if not todo:
        return
    vocab = SHAPES[shape]["vocab_size"]
    extra = os.environ.get(f"FLAGS_{engine.upper()}", "").split()
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", *_SERVE[engine], str(make_model(shape)), "--served-model-name", "m",
         *_COMMON, *extra]
    )  # fmt: skip
    try:
        _wait(server)
        start = time.perf_counter() - began
        load(vocab, 8, 16)
        with results.open("a") as file:
            for name, streams in todo.items():
                record: dict[str, Any] = {
                    "engine": engine, "version": version(engine), "shape": shape,
                    "workload": name, "card": card(), "start_s": round(start, 1),
                }  # fmt: skip
                record |= load(vocab, streams, LOADS[streams])
                print(json.dumps(record), file=file, flush=True)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
