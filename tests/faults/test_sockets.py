# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T06: what a server listens on, and what its own sockets do with messages of others."""

import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from llmserve.core.messages import (
    EngineOutputs,
    EngineRequest,
    LogprobColumns,
    RequestExtra,
    SchedulerStats,
)
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.channel import Codec, push_socket
from tests.helpers.faults import Bench
from tests.helpers.server import processes_of

CODEC = Codec()


def tcp_listeners(pids: list[int]) -> set[int]:
    """Ports that the processes listen on."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            target = str(fd.readlink()) if fd.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or table.startswith("udp")):
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def sockets_of(bench: Bench) -> list[Path]:
    found = [path for path in bench.server.runtime.rglob("*") if path.is_socket()]
    assert {"engine-0.sock", "client-0.sock", "client-1.sock"} <= {path.name for path in found}
    return found


def random_value(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.randrange(9 if depth else 6)
    if kind == 0:
        return rng.choice([0, 1, -1, 2**31, 2**32, 2**63, -(2**63), 2**64 - 1])
    if kind == 1:
        return rng.choice([0.0, -1.0, 1e308, float("nan"), float("inf")])
    if kind == 2:
        return rng.randbytes(rng.choice([0, 1, 4, 64]))
    if kind == 3:
        return rng.choice(["", "req", "abort", "call", "out", "ready", "x" * 300])
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return rng.randrange(1000)
    values = [random_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return values if kind < 8 else {str(index): value for index, value in enumerate(values)}


def valid_messages() -> Iterator[bytes]:
    """Of both directions, for clients and requests that do not exist."""
    for client in (0, 1):
        request = EngineRequest(
            client=client, request_id=4_000_000_000, prompt=struct.pack("3i", 1, 2, 3),
            params=SamplingParams(max_tokens=2), arrival=0.0,
        )  # fmt: skip
        yield CODEC.encode(request)
    columns = LogprobColumns(1, 1, bytes(4), bytes(4), bytes(4))
    yield CODEC.encode(
        EngineOutputs(
            ids=struct.pack("I", 4_000_000_001),
            tokens=bytes(4),
            extras={4_000_000_001: RequestExtra(logprobs=columns)},
            stats=SchedulerStats(),
        )  # fmt: skip
    )


def typed_but_wrong(rng: random.Random) -> bytes:
    """A message with one field that is something else."""
    message = msgspec.msgpack.decode(rng.choice(list(valid_messages())))
    at = rng.randrange(len(message))
    if isinstance(message[at], list) and rng.random() < 0.5:
        message[at][rng.randrange(len(message[at]))] = random_value(rng)
    else:
        message[at] = random_value(rng)
    if message[0] in ("ready", "failed"):  # what only our own user could say, and is believed
        message[0] = "none"
    return msgspec.msgpack.encode(message)


def hostile_frames(canary: Path) -> Iterator[bytes]:
    rng = random.Random(6)
    command = f"cos\nsystem\n(S'touch {canary}'\ntR."
    yield command.encode()
    yield b"\x80\x04\x95" + command.encode()
    yield b""
    yield b"\x91" * 100_000
    yield b"\x81\xa1a" * 100_000 + b"\x01"
    yield b"\xdd\xff\xff\xff\xff" + b"\x00" * 100  # an array of 4 billion
    yield b"\xc6\xff\xff\xff\xff" + b"\x00" * 100
    for _ in range(300):
        yield rng.randbytes(rng.randrange(1, 300))
    for _ in range(300):
        yield msgspec.msgpack.encode(random_value(rng))
    for _ in range(1500):
        yield typed_but_wrong(rng)
    for message in valid_messages():
        for _ in range(100):
            data = bytearray(message)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            if b"failed" not in data and b"ready" not in data:
                yield bytes(data)


def test_t06_only_the_api_listens(bench: Bench) -> None:
    port = int(bench.server.url.rpartition(":")[2])
    assert tcp_listeners(processes_of(bench.server.process.pid)) == {port}
    for path in sockets_of(bench):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_t06_frames_of_others_are_dropped_and_counted(bench: Bench, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dropped = "llmserve:dropped_frames_total", "llmserve:api_dropped_frames_total"
    with bench.load_and_invariants(max_rss_growth=100 << 20, failed=3):
        before = bench.server.metrics()
        for path in sockets_of(bench):
            push = push_socket(context, f"ipc://{path}", linger_ms=2000)
            for data in hostile_frames(canary):
                push.send(data)
            push.send_multipart([b"one", b"two"])
            push.close()
            flood = push_socket(context, f"ipc://{path}")
            flood.send(bytes(600 << 20))  # larger than any socket takes
            bench.complete("between", 20)
            flood.close()
        context.term()
        bench.complete("after", 20)
        after = bench.server.metrics()
        assert all(after[name] > before[name] + 500 for name in dropped)
    assert not canary.exists()


@pytest.mark.parametrize("message", list(valid_messages())[:2])
def test_valid_messages_are_not_among_the_dropped(message: bytes) -> None:
    assert CODEC.decode_to_engine(message)
