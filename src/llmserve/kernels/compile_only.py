# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Launches that only compile, for a card that need not be there.

Triton's disk cache is keyed by what a launch passes: types, constants, which numbers and addresses
are multiples of 16. So the launching code itself runs, over tensors of the meta device, whose
address 0 is as aligned as what the allocator returns on a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llmserve.errors import ConfigError
from llmserve.kernels.triton_jit import Card, absent

try:
    from triton import __version__, knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
except ImportError:
    JITFunction = None


def cache_folder() -> Path | None:
    """Where Triton keeps what it has compiled; None where it is not installed."""
    return None if JITFunction is None else Path(knobs.cache.dir)


def kernels_id() -> str:
    """Of the kernels' code, the tables of tiles and Triton."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


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


def _seen(arg: Any) -> Any:
    """What a launch can depend on: of a tensor its dtype and alignment."""
    return (str(arg.dtype), arg.data_ptr() % 16) if hasattr(arg, "data_ptr") else arg


@contextlib.contextmanager
def compile_only(card: Card, part: tuple[int, int] = (0, 1)) -> Iterator[list[Compiled]]:
    """Inside, Triton kernels called over meta tensors are compiled for `card`, or found in the
    cache, and not run; the list fills with them, one a launch. Of (i, n) parts, only the launches
    of part i are. For one thread of a process that launches nothing else meanwhile.
    """
    if JITFunction is None:
        raise ConfigError("Triton is not installed: there are no kernels to compile")
    done: list[Compiled] = []
    run, before = JITFunction.run, driver._active
    index, count = part
    known: dict[str, Compiled] = {}

    def compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = repr((kernel.__name__, [_seen(arg) for arg in args], sorted(options.items())))
        if zlib.crc32(key.encode()) % count != index:
            return
        if key not in known:
            made = run(kernel, *args, grid=grid, warmup=True, **options)
            known[key] = Compiled(made.name, made.metadata.shared)
        done.append(known[key])

    driver.set_active(_AbsentCard(card))
    JITFunction.run = compile
    absent.card = card
    try:
        yield done
    finally:
        driver._active = before
        JITFunction.run = run
        absent.card = None
