# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The program as its users run it, in processes of its own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

# What was there stays behind it: dependencies need not be installed where Python looks by itself
_SRC = ":".join(
    [str(Path(__file__).parents[2] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and nobody asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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


def llmserve(
    *arguments: str, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end; stderr is part of its stdout."""
    return subprocess.run(
        [sys.executable, "-m", "llmserve", *arguments],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": _SRC} | (env or {}),
        timeout=timeout,
    )


class Server:
    """Use as a context manager; leaving it asserts that nothing stays behind.

    It listens on a free port of 127.0.0.1, unless `arguments` have --uds.
    """

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        self.output: list[str] = []
        self.url = ""
        self.uds = arguments[arguments.index("--uds") + 1] if "--uds" in arguments else None
        self.runtime = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        port = () if self.uds else ("--port", "0")
        runtime = str(self.runtime)
        own = {"PYTHONPATH": _SRC, "XDG_RUNTIME_DIR": runtime, "TMPDIR": runtime}
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "llmserve", "serve", *arguments, *port],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | own | (env or {}),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.pids: list[int] = []
        self.http = httpx.Client()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
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
        match = re.search(r"is ready on (http://\S+)/v1", self.text)
        assert match is not None, self.text
        self.url = match.group(1)
        transport = httpx.HTTPTransport(uds=self.uds) if self.uds else None
        self.http = httpx.Client(base_url=self.url, transport=transport, timeout=60.0)
        self.pids = processes_of(self.process.pid)
        return self

    def pid_of(self, module: str) -> int:
        """The process that runs `module`, like llmserve.engine.process."""
        for pid in self.pids:
            if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                return pid
        raise AssertionError(f"no process runs {module}")

    def post(self, path: str, **body: Any) -> Any:
        """The decoded answer to a JSON body; the test fails unless it is a 200."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> dict[str, float]:
        """Sample name -> value summed over labels; and by name{value} for each label of its own."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                own = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
                for key in {sample.name, *(f"{sample.name}{{{value}}}" for value in own)}:
                    values[key] = values.get(key, 0.0) + sample.value
        return values

    def check_idle(self, timeout: float = 5.0) -> None:
        """No request left, no block lost, all processes as they were."""
        deadline = time.monotonic() + timeout
        while True:
            m = self.metrics()
            left = m["vllm:num_requests_running"] + m["vllm:num_requests_waiting"]
            used, total = m["llmserve:kv_blocks{used}"], m["llmserve:kv_blocks"]
            if left == used == 0:
                break
            assert time.monotonic() < deadline, f"{left} requests and {used} of {total} blocks left"
            time.sleep(0.05)
        assert total > 0
        assert set(self.pids) <= set(processes_of(self.process.pid)), self.text

    def stop(self, number: int = signal.SIGTERM, timeout: float = 15.0) -> int:
        """Signals the supervisor; its exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 15.0) -> int:
        """The exit code, once it ended by itself."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def check_gone(self, timeout: float = 3.0) -> None:
        """No process of it is left, nor its folder of sockets."""
        deadline = time.monotonic() + timeout
        while alive := [pid for pid in self.pids if is_alive(pid)]:
            assert time.monotonic() < deadline, f"left behind: {alive}\n{self.text}"
            time.sleep(0.02)
        assert not list(self.runtime.iterdir()), self.text

    def __enter__(self) -> "Server":
        return self.wait_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            try:
                code = self.stop()
                assert kind or code == 0, self.text
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.wait()
        self.http.close()
        if kind is None:
            self.check_gone()
        shutil.rmtree(self.runtime)
