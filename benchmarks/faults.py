# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What an OpenAI server, ours or another, does when it is asked nonsense, killed, stopped, flooded.

    python -m benchmarks.faults --port 8099 --width 49152 -- llama-server -m F --port 8099
    python -m benchmarks.faults --port 8098 --width 49152 --engine llmserve.engine.process -- \
        llmserve serve F --port 8098
    python -m benchmarks.faults --port 8000 --width 151936 --engine EngineCore -- \
        vllm serve DIR --port 8000

`--engine` is a word of the command line of the process that is killed and stopped; without it that
is the server itself. Prints one row a fault: T01 to T04 and T19 of tests/faults/README.md.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

COMPLETIONS = "/v1/completions"
NAN_FIELDS = {
    "temperature": "NaN -1 1e400", "top_p": "NaN 2 -1", "max_tokens": "9223372036854775808 1.5",
    "n": "1000000000 0", "logprobs": "1000000", "top_k": "1e400", "seed": "1e400",
    "presence_penalty": "NaN 1e308", "repetition_penalty": "NaN 0",
}  # fmt: skip


def descendants(root: int) -> list[int]:
    """Pids of `root` and all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int(
                (entry / "stat").read_text().rpartition(")")[2].split()[1]
            )
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


class Served:
    """One server, started again for a row that it did not survive."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.url = f"http://127.0.0.1:{args.port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.process: subprocess.Popen[bytes] | None = None
        self.model = ""

    def start(self) -> None:
        """Until it answers a request, for ten minutes at most."""
        if self.process is not None and self.process.poll() is None and self.works(5):
            return
        self.end()
        log = open(self.args.log, "ab")  # noqa: SIM115 (the server's)
        self.process = subprocess.Popen(
            self.args.command, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        began = time.monotonic()
        while not self.works(10):
            if self.process.poll() is not None or time.monotonic() - began > 600:
                raise SystemExit(f"the server did not start; see {self.args.log}")
            time.sleep(0.2)

    def works(self, timeout: float) -> bool:
        """Whether it answers a request now."""
        try:
            if not self.model:
                self.model = self.http.get("/v1/models").json()["data"][0]["id"]
            answer = self.ask({"prompt": "Hello", "max_tokens": 2}, timeout=timeout)
        except (httpx.HTTPError, ValueError, LookupError):
            return False
        return answer.status_code == 200

    def ask(self, body: dict[str, Any], timeout: float = 30) -> httpx.Response:
        """One completion."""
        return self.http.post(COMPLETIONS, json={"model": self.model} | body, timeout=timeout)

    def engine(self) -> int:
        """The process that computes."""
        assert self.process is not None
        word = self.args.engine
        for pid in descendants(self.process.pid) if word else []:
            with contextlib.suppress(OSError):
                line = (
                    Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/comm").read_text()
                )
                if word in line and pid != self.process.pid:
                    return pid
        return self.process.pid

    def health(self) -> str:
        """What a load balancer would see."""
        try:
            return str(self.http.get("/health", timeout=1).status_code)
        except httpx.HTTPError as error:
            return type(error).__name__

    def end(self) -> None:
        """Ends it and all that it started."""
        if self.process is not None:
            for pid in reversed(descendants(self.process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def survived(server: Served) -> str:
    if server.works(20):
        return "serves on"
    assert server.process is not None
    code = server.process.poll()
    return "answers nothing more" if code is None else f"ended with {code}"


def outcomes(server: Served, texts: list[str]) -> str:
    seen: Counter[str] = Counter()
    for text in texts:
        try:
            answer = server.http.post(
                COMPLETIONS, content=text, headers={"content-type": "application/json"}, timeout=20
            )
            seen[str(answer.status_code)] += 1
        except httpx.HTTPError as error:
            seen[type(error).__name__] += 1
    return ", ".join(f"{count} x {name}" for name, count in sorted(seen.items()))


def t01(server: Served) -> str:
    """Token ids that the model has not."""
    texts = []
    for bad in (-1, server.args.width, 2**31, 2**63):
        base = {"model": server.model, "prompt": "a", "max_tokens": 4}
        for fields in (
            {"prompt": [5, bad]}, {"logit_bias": {str(bad): 5}}, {"stop_token_ids": [bad]},
            {"allowed_token_ids": [bad]}, {"stop_token_ids": [bad], "min_tokens": 2},
        ):  # fmt: skip
            texts.append(json.dumps(base | fields))
    return f"{outcomes(server, texts)}; {survived(server)}"


def t02(server: Served) -> str:
    """Numbers that are none."""
    start = json.dumps({"model": server.model, "prompt": "a"})[:-1]
    texts = [
        f'{start}, "{name}": {value}}}'
        for name, values in NAN_FIELDS.items()
        for value in values.split()
    ]
    return f"{outcomes(server, texts)}; {survived(server)}"


def load(server: Served, ended: list[str], count: int) -> list[threading.Thread]:
    """`count` streams, whose ends come into `ended`."""

    def stream(index: int) -> None:
        body = {
            "model": server.model, "prompt": f"Count from {index}:", "max_tokens": 800,
            "stream": True, "ignore_eos": True,
        }  # fmt: skip
        how = "cut"
        try:
            with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    if '"error"' in line:
                        how = "error event"
                    elif line == "data: [DONE]":
                        how = "done"
        except httpx.TimeoutException:
            how = "nothing for 60 s"
        except httpx.HTTPError:
            pass
        ended.append(how)

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    return threads


def lost(server: Served, number: int) -> str:
    """A signal to the engine, and what the world sees of it for 40 seconds."""
    ended: list[str] = []
    threads = load(server, ended, 8)
    pid, began = server.engine(), time.monotonic()
    os.kill(pid, number)
    seen: list[str] = []
    back = 0.0
    while not back and time.monotonic() - began < server.args.patience:
        health = server.health()
        seen += [health] if health not in seen[-1:] else []
        if health == "200" and len(seen) > 1 and server.works(3):
            back = time.monotonic() - began
        time.sleep(0.2)
    ended += ["still open"] * (len(threads) - len(ended))
    said = ", ".join(f"{count} x {how}" for how, count in sorted(Counter(ended).items()))
    if not back:
        server.end()
    for thread in threads:
        thread.join()
    again = f"serves again after {back:.1f} s" if back else "does not serve again"
    return f"streams: {said}; /health: {' -> '.join(seen)}; {again}"


def t03(server: Served) -> str:
    """The engine is killed under 8 streams."""
    return lost(server, signal.SIGKILL)


def t04(server: Served) -> str:
    """The engine is stopped under 8 streams."""
    return lost(server, signal.SIGSTOP)


def t19(server: Served) -> str:
    """Far more than it can do, for 20 seconds; then one request."""
    body = {
        "model": server.model, "prompt": "Say something:", "ignore_eos": True,
        "max_tokens": server.args.tokens,
    }  # fmt: skip
    alone = time.monotonic()
    server.ask(body, timeout=300)
    alone = time.monotonic() - alone
    served: list[float] = []
    refused: list[float] = []
    others: Counter[str] = Counter()

    async def one(http: httpx.AsyncClient) -> None:
        began = time.monotonic()
        try:
            answer = await http.post(COMPLETIONS, json=body)
        except httpx.HTTPError as error:
            others[type(error).__name__] += 1
            return
        times = {200: served, 503: refused, 429: refused}.get(answer.status_code)
        if times is None:
            others[str(answer.status_code)] += 1
        else:
            times.append(time.monotonic() - began)

    async def flood() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            tasks = []
            for _ in range(int(20 * server.args.rate)):
                tasks.append(asyncio.create_task(one(http)))
                await asyncio.sleep(1 / server.args.rate)
            await asyncio.gather(*tasks)

    began = time.monotonic()
    asyncio.run(flood())
    took = time.monotonic() - began
    after = time.monotonic()
    server.ask(body, timeout=300)
    after = time.monotonic() - after

    def at(times: list[float], part: float) -> str:
        return f"{sorted(times)[int((len(times) - 1) * part)]:.2f}" if times else "-"

    return (
        f"{len(served)} served (median {at(served, 0.5)} s, p99 {at(served, 0.99)} s), "
        f"{len(refused)} refused (p99 {at(refused, 0.99)} s), {dict(others)}, all over after "
        f"{took:.0f} s; one request {alone:.2f} s before, {after:.2f} s after"
    )


ROWS = {"T01": t01, "T02": t02, "T03": t03, "T04": t04, "T19": t19}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--width", type=int, required=True, help="of the logits")
    parser.add_argument("--engine", default="")
    parser.add_argument("--rate", type=float, default=40, help="requests a second of T19")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer in T19")
    parser.add_argument("--patience", type=float, default=40, help="seconds for a server to return")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--log", default=os.devnull, help="where the server's output goes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    args.command = args.command[args.command[:1] == ["--"] :]
    server = Served(args)
    try:
        for name in args.rows.split(","):
            server.start()
            print(f"| {name} | {ROWS[name](server)} |", flush=True)
    finally:
        server.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
