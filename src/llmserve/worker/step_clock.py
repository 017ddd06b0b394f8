# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What steps take, where they are run: the host sees a step end when it comes to look."""

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


class _Event(Protocol):
    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class _HostEvent:
    """torch.cuda.Event of a CPU, where whatever was called is done."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: "_HostEvent") -> float:
        return 1e3 * (end_event.time - self.time)


class StepClock:
    """Marks on the device's stream. A step that is begun while the one before it is in flight
    counts from where that one ends: it cannot begin before, and what it makes the device wait for
    is its own."""

    def __init__(self, device: torch.device) -> None:
        self._new: Callable[[], _Event] = _HostEvent
        if device.type == "cuda":
            self._new = functools.partial(torch.cuda.Event, enable_timing=True)
        self._began: _Event | None = None
        self.last: _Event | None = None  # end of the last step, until somebody has waited for it

    def begin(self) -> None:
        """Before anything of a step is enqueued."""
        self._began = self.last if self.last is not None else self._mark()

    def end(self) -> "StepTime":
        """Behind all of the step that was begun last."""
        assert self._began is not None, "a step that was not begun"
        self.last = self._mark()
        return StepTime(self, self._began, self.last)

    def _mark(self) -> _Event:
        event = self._new()
        event.record()
        return event


class StepTime:
    """A step in flight."""

    def __init__(self, clock: StepClock, began: _Event, ended: _Event) -> None:
        self._clock, self._began, self._ended = clock, began, ended

    def wait(self) -> float:
        """Until the step is done; ModelRunnerOutput.seconds of it."""
        self._ended.synchronize()
        if self._clock.last is self._ended:
            self._clock.last = None
        return self._began.elapsed_time(self._ended) / 1e3
