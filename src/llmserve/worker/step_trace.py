# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a card did during some steps, and what the host waited for, from torch's profiler.

Read from the Chrome trace that it writes: its `cat` tells kernels, copies and calls of the CUDA
runtime apart, and a copy's name says what memory is at its ends.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_WINDOW = "llmserve steps"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CALLS = ("cuda_runtime", "cuda_driver")
# Calls that wait for the device, or that wait for all that uses memory, or that load code. The
# driver's names and the runtime's; an event may be waited for.
_BLOCKING = re.compile(
    r"cu(da)?(Stream|Device|Ctx|Thread)Synchronize"
    r"|cu(da)?Memcpy((?!Async).)*|cu(da)?Memset((?!Async).)*"
    r"|cu(da)?(Malloc|Free|HostAlloc|HostRegister|HostUnregister|Mem(Alloc|Free)|MemCreate).*"
    r"|cu(da)?(ModuleLoad|LibraryLoad|LinkCreate).*"
)


@dataclass(frozen=True)
class Event:
    """One event of a trace. Times in microseconds."""

    kind: str  # the trace's category
    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """When it was over."""
        return self.start + self.duration


@dataclass
class Trace:
    """Calls and the device's work that began in a window of `num_steps` steps, in order of time."""

    num_steps: int
    calls: list[Event] = field(default_factory=list)
    work: list[Event] = field(default_factory=list)

    @property
    def offenders(self) -> list[str]:
        """Calls and copies that a step must not have, each with how often it occurred."""
        names = [call.name for call in self.calls if _BLOCKING.fullmatch(call.name)]
        names += [
            event.name
            for event in self.work
            if event.kind == "gpu_memcpy" and "pageable" in event.name.lower()
        ]
        return [f"{names.count(name)} x {name}" for name in sorted(set(names))]

    @property
    def span_us(self) -> float:
        """From the first piece of work to the end of the last."""
        return max(e.end for e in self.work) - self.work[0].start if self.work else 0.0

    @property
    def busy_us(self) -> float:
        """Time in which the device had something to do; work that overlaps counts once."""
        busy, until = 0.0, float("-inf")
        for event in self.work:
            busy += max(0.0, event.end - max(event.start, until))
            until = max(until, event.end)
        return busy

    @property
    def idle_share(self) -> float:
        """Of `span_us`, 0 to 1."""
        return 1 - self.busy_us / self.span_us if self.work else 0.0

    def by_kernel(self) -> list[tuple[float, float, str]]:
        """(microseconds, number, name) of each kind of work in a step, the longest first. Kernels
        that start while the one before ends are counted from their start on."""
        totals: dict[str, tuple[float, int]] = {}
        for event in self.work:
            us, count = totals.get(event.name, (0.0, 0))
            totals[event.name] = us + event.duration, count + 1
        rows = [
            (us / self.num_steps, count / self.num_steps, name)
            for name, (us, count) in totals.items()
        ]
        return sorted(rows, reverse=True)


def read_trace(events: Iterable[dict[str, Any]], num_steps: int) -> Trace:
    """From the `traceEvents` of a Chrome trace: what lies in the window of `record`."""
    complete = [event for event in events if event.get("ph") == "X"]
    (window,) = [
        event
        for event in complete
        if event["name"] == _WINDOW and event.get("cat") == "user_annotation"
    ]
    start, end = window["ts"], window["ts"] + window["dur"]
    trace = Trace(num_steps)
    for event in complete:
        if start <= event["ts"] < end:
            if event.get("cat") in _CALLS:
                trace.calls.append(_event(event))
            elif event.get("cat") in _ON_DEVICE:
                trace.work.append(_event(event))
    trace.calls.sort(key=lambda e: e.start)
    trace.work.sort(key=lambda e: e.start)
    return trace


def _event(event: dict[str, Any]) -> Event:
    return Event(event["cat"], event["name"], event["ts"], event["dur"])


class Recorder:
    """Holds the trace once `record` is left."""

    def __init__(self, num_steps: int) -> None:
        self.trace = Trace(num_steps)


@contextlib.contextmanager
def record(num_steps: int) -> Iterator[Recorder]:
    """Traces what is done inside, which is `num_steps` steps. The device's work counts where it
    starts inside: of steps that overlap, as much is lost at the end as is won at the beginning."""
    recorder = Recorder(num_steps)
    cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as prof, record_function(_WINDOW):
        yield recorder
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        recorder.trace = read_trace(json.loads(path.read_text())["traceEvents"], num_steps)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """Bytes a second that the card reads and writes while it copies `num_bytes`."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    del source, target
    torch.cuda.empty_cache()
    return 2 * num_bytes / best
