# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a streamed token costs API server and engine process, with an executor that has no model.

The whole server runs: supervisor, engine process, API servers; each of the streams gets one token a
step, and a step takes `--step` milliseconds. CPU time is that of the processes in the token phase,
from /proc, so it holds on a busy machine too; tokens/s are those that arrived.

    python -m benchmarks.frontend [--servers 1 2] [--streams 64] [--step 5] [--seconds 5]
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import uvloop

from llmserve.cli.serve import Supervisor, listen
from llmserve.config.engine import EngineConfig
from llmserve.config.server import ServerConfig
from llmserve.frontend.tokenizer import load_tokenizer
from tests.helpers.server import processes_of
from tests.helpers.tiny_models import write_tiny_model

CONTEXT = 2048
TEXT = "The sea is calm tonight, the tide is full, and 3.14 is 'about' right. "
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def write_model(folder: Path, step_s: float) -> None:
    """A tiny model's folder, whose output is TEXT again and again."""
    write_tiny_model(folder, "llama", max_position_embeddings=CONTEXT)
    tokenizer = load_tokenizer(str(folder))
    script = tokenizer.encode(TEXT, add_special_tokens=False)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"fake": {"delay": step_s, "script": script}}))


def serve(folder: Path, port: int, servers: int) -> None:
    """The server, until it is killed."""
    engine = EngineConfig.from_flags(
        model=str(folder), executor="fake", load_format="dummy", device="cpu", max_num_seqs=256,
        max_model_len=CONTEXT, kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip
    config = ServerConfig(port=port, api_server_count=servers, disable_uvicorn_access_log=True)
    with listen(config) as sock:
        Supervisor(engine, config, sock, []).run()


class Client(asyncio.Protocol):
    """One stream; `shared` counts the events of all."""

    def __init__(self, shared: dict[str, int], tokens: int) -> None:
        self._shared = shared
        self._tokens = tokens

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the request."""
        message = {"role": "user", "content": "Go on."}
        body = {"messages": [message], "max_tokens": self._tokens, "ignore_eos": True}
        data = json.dumps(body | {"stream": True, "temperature": 0}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        cast(asyncio.Transport, transport).write(head.encode() + data)

    def data_received(self, data: bytes) -> None:
        """Events may be cut anywhere; their end is not."""
        self._shared["events"] += data.count(b"\n\n")
        self._shared["chunks"] += data.count(b"data: {")


def cpu_s(supervisor: int) -> dict[str, list[float]]:
    """CPU seconds so far of the processes below the supervisor, by their module."""
    found: dict[str, list[float]] = {}
    for pid in processes_of(supervisor):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        role = words[words.index("-m") + 1]
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found.setdefault(role, []).append((int(fields[11]) + int(fields[12])) * _TICK_S)
    return found


async def load(port: int, pid: int, streams: int, seconds: float) -> None:
    """Prints one line."""
    loop = asyncio.get_running_loop()
    shared = {"events": 0, "chunks": 0}
    tokens = CONTEXT - 64
    transports = [
        (await loop.create_connection(lambda: Client(shared, tokens), "127.0.0.1", port))[0]
        for _ in range(streams)
    ]
    while shared["chunks"] < 20 * streams:
        await asyncio.sleep(0.02)
    began, before, counted = time.monotonic(), cpu_s(pid), shared["chunks"]
    await asyncio.sleep(seconds)
    took, after, count = time.monotonic() - began, cpu_s(pid), shared["chunks"] - counted
    parts = []
    for role in ("llmserve.api.server", "llmserve.engine.process"):
        used = [b - a for a, b in zip(before[role], after[role], strict=True)]
        each = " + ".join(f"{one / took:.2f}" for one in used)
        parts.append(f"{role.split('.')[1]} {sum(used) / count * 1e6:5.1f} us/chunk ({each} cores)")
    print(f"{count / took:8,.0f} chunks/s  {'  '.join(parts)}", flush=True)
    for transport in transports:
        transport.close()


def main() -> None:
    """Each number of servers, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=18123)
    flags = parser.parse_args()
    if flags.serve:
        serve(Path(flags.serve), flags.port, flags.servers[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), flags.step / 1000)
        for _ in range(flags.runs):
            for count in flags.servers:
                command = [sys.executable, "-m", "benchmarks.frontend", "--serve", folder]
                command += ["--servers", str(count), "--port", str(flags.port)]
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                    assert server.stdout is not None
                    while "startup complete" not in (line := server.stdout.readline()) and line:
                        pass
                    print(f"{count} servers, {flags.streams} streams: ", end="")
                    try:
                        uvloop.run(load(flags.port, server.pid, flags.streams, flags.seconds))
                    finally:
                        server.kill()


if __name__ == "__main__":
    main()
