# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Launches that only compile, for a card that need not be there.

Triton's disk cache is keyed by what a launch passes: types, constants, which numbers and addresses
are multiples of 16. So the launching code itself runs, over tensors of the meta device, whose
address 0 is as aligned as what the allocator returns on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from llmserve.errors import ConfigError
from llmserve.kernels import triton_jit

try:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
except ImportError:
    JITFunction = None


class Compiled(NamedTuple):
    """A kernel, and the bytes of shared memory that its block takes."""

    name: str
    shared: int


class _AbsentCard:
    """What Triton asks its driver when it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # its kernels are kept apart from those of real devices

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Compiled]]:
    """Inside, Triton kernels called over meta tensors are compiled for `arch` (90 is compute
    capability 9.0), or found in the cache, and not run; the list fills with them, one a launch.
    For one thread of a process that launches nothing else meanwhile.
    """
    if JITFunction is None:
        raise ConfigError("Triton is not installed: there are no kernels to compile")
    done: list[Compiled] = []
    run, has_pdl, before = JITFunction.run, triton_jit._has_pdl, driver._active

    def compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        done.append(Compiled(made.name, made.metadata.shared))

    driver.set_active(_AbsentCard(arch))
    JITFunction.run = compile
    triton_jit._has_pdl = lambda device: arch >= 90  # type: ignore[assignment]
    try:
        yield done
    finally:
        driver._active = before
        JITFunction.run = run
        triton_jit._has_pdl = has_pdl
