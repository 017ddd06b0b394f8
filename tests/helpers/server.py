# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A real `llmserve serve` in processes of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import httpx
from prometheus_client.parser import text_string_to_metric_families

_SRC = str(Path(__file__).parents[2] / "src")


def processes_of(session_leader: int) -> list[int]:
    """Pids of `session_leader` and all that descend from it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = [session_leader] if session_leader in parents else []
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


class Server:
    """Use as a context manager; leaving it asserts that nothing stays behind."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.output: list[str] = []
        self.url = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmserve", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": _SRC} | (env or {}),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.pids: list[int] = []

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        """All that it printed so far."""
        return "\n".join(self.output)

    def wait_ready(self, timeout: float = 60.0) -> "Server":
        """Until it says that it is up; the test fails with its output if it ends before."""
        deadline = time.monotonic() + timeout
        while "Application startup complete." not in self.text:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self._reader.join(2)
                raise AssertionError(f"server did not start:\n{self.text}")
            time.sleep(0.02)
        match = re.search(r"http://127\.0\.0\.1:(\d+)", self.text)
        assert match is not None, self.text
        self.url = match.group(0)
        self.pids = processes_of(self.process.pid)
        return self

    def metrics(self) -> dict[str, float]:
        """Sample name -> value, summed over labels."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def check_idle(self, timeout: float = 5.0) -> None:
        """No request left, no block lost, all processes as they were."""
        deadline = time.monotonic() + timeout
        while True:
            m = self.metrics()
            left = m["vllm:num_requests_running"] + m["vllm:num_requests_waiting"]
            free = m["llmserve:kv_blocks_free"] + m["llmserve:kv_blocks_cached"]
            if left == 0 and free == m["llmserve:kv_blocks_total"]:
                break
            assert time.monotonic() < deadline, (left, free, m["llmserve:kv_blocks_total"])
            time.sleep(0.05)
        assert set(self.pids) <= set(processes_of(self.process.pid)), self.text

    def stop(self, number: int = signal.SIGTERM, timeout: float = 15.0) -> int:
        """Signals the supervisor; its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def __enter__(self) -> "Server":
        return self.wait_ready()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.process.kill()
        if kind is None:
            alive = [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]
            assert not alive, f"left behind: {alive}\n{self.text}"
