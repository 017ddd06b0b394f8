# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Fills Triton's cache by processes while a worker loads its weights, where the cache is empty.

Some forty kernels take half a second and more each. A mark in the cache's own folder says for which
code, card and sizes this was done: it goes where the kernels go.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import time

import msgspec

from llmserve.config.hf import ModelDescription
from llmserve.kernels.compilations import compilations
from llmserve.kernels.compile_only import cache_folder, kernels_id
from llmserve.kernels.triton_jit import Card
from llmserve.utils.child import Child
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_PROCESSES = 8
_MOST_S = 120.0  # after which a start compiles by itself


class CompileStart(msgspec.Struct):
    """Of compile_steps.compile_steps; the process's own part of it is `part`, as compile_only's."""

    description: ModelDescription
    dtype: str
    card: Card
    max_rows: int
    max_model_len: int
    block_size: int
    part: tuple[int, int] = (0, 1)
    report_fd: int = -1  # takes the hashes of what was compiled, a line each


class StepCompilers:
    """Running from the start on, unless there is a mark or there are too few cores."""

    def __init__(self, start: CompileStart) -> None:
        self._children: list[Child] = []
        self._reports: list[int] = []
        folder = cache_folder()
        if folder is None:
            return
        self._began = time.monotonic()
        self._mark = folder / f"llmserve-{_digest(start)}"
        count = min(_PROCESSES, len(os.sched_getaffinity(0)) // 2)
        if count > 1 and not self._mark.exists():
            logger.info("compiling kernels for this card and model, by %d processes", count)
            for index in range(count):
                report, theirs = os.pipe()
                part = msgspec.structs.replace(start, part=(index, count), report_fd=theirs)
                self._children.append(Child("llmserve.worker.compile_steps", part, (theirs,)))
                self._reports.append(report)
                os.close(theirs)

    def wait(self) -> None:
        """Until all is compiled; what a process left out is compiled when it is first launched."""
        if not self._children:
            return
        until, codes = time.monotonic() + _MOST_S, []
        for child in self._children:
            try:
                codes.append(child.process.wait(max(0.0, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(-1)
            child.end(0.0)
        for report in self._reports:
            with open(report) as lines:
                compilations().compiled.update(lines.read().split())
        self._children, self._reports = [], []
        if any(codes):
            logger.warning("processes that compile kernels ended with codes %s", codes)
            return
        logger.info("compiled kernels in %.1f s", time.monotonic() - self._began)
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        self._mark.touch()


def _digest(start: CompileStart) -> str:
    """Of everything that decides what is compiled."""
    sizes = (start.dtype, start.card, start.max_rows, start.max_model_len, start.block_size)
    data = (kernels_id(), sizes, start.description.hf_config)
    return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()[:16]
