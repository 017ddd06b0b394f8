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
from llmserve.kernels.triton_jit import Card, absent

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

    def __init__(self, card: Card) -> None:
        self.card = card

    def get_current_device(self) -> str:
        return f"sm_{self.card.arch}"  # its kernels are kept apart from those of real devices

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.card.arch, 32)


@contextlib.contextmanager
def compile_only(card: Card) -> Iterator[list[Compiled]]:
    """Inside, Triton kernels called over meta tensors are compiled for `card`, or found in the
    cache, and not run; the list fills with them, one a launch. For one thread of a process that
    launches nothing else meanwhile.
    """
    if JITFunction is None:
        raise ConfigError("Triton is not installed: there are no kernels to compile")
    done: list[Compiled] = []
    run, before = JITFunction.run, driver._active

    def compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(kernel, *args, grid=grid, warmup=True, **options)
        done.append(Compiled(made.name, made.metadata.shared))

    driver.set_active(_AbsentCard(card))
    JITFunction.run = compile
    absent.card = card
    try:
        yield done
    finally:
        driver._active = before
        JITFunction.run = run
        absent.card = None
