# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Triton where it is installed; a CPU install has none and uses the torch references alone.

Arguments that change from step to step are not specialized on (a value of 1, multiples of 16,
aligned addresses): each such case would be compiled when it first comes up, while serving.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from llmserve import envs

try:
    import triton
    import triton.language as tl

    loop: Callable[..., Any] = tl.range
except ImportError:
    triton: Any = SimpleNamespace(  # type: ignore[no-redef]
        jit=lambda kernel=None, **options: kernel or (lambda function: function)
    )
    tl: Any = None  # type: ignore[no-redef]
    loop = range

if envs.TRITON_INTERPRET:
    # Triton 3.6's interpreter cannot turn its scalars, arrays of one element, into ints where numpy
    # is 2.4 or newer.
    def loop(*bounds: Any) -> range:
        """tl.range over interpreted scalars."""
        return range(*(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds))


def use_triton(x: torch.Tensor) -> bool:
    """Whether `x` goes to a Triton kernel: on a GPU, and everywhere in the interpreter."""
    return on_gpu(x) or envs.TRITON_INTERPRET


def on_gpu(x: torch.Tensor) -> bool:
    """Whether `x` is on a GPU, or stands for what is on one where kernels are only compiled."""
    return x.is_cuda or x.is_meta


class Card(NamedTuple):
    """A GPU as kernels know it; `arch` 90 is compute capability 9.0."""

    name: str
    arch: int
    multiprocessors: int


class _Absent:
    """The card that the meta device stands for, inside compile_only.py's context."""

    card: Card | None = None


absent = _Absent()


def card_of(device: torch.device) -> Card | None:
    """The card of a device; None for a CPU."""
    if device.type == "cuda":
        return _present(device)
    return absent.card if device.type == "meta" else None


@functools.cache
def _present(device: torch.device) -> Card:
    card = torch.cuda.get_device_properties(device)
    return Card(card.name, 10 * card.major + card.minor, card.multi_processor_count)


def pdl_of(x: torch.Tensor) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch where `x`'s device has it: a kernel then
    starts while the one before it ends. Such a kernel calls gdc_wait in every program before it
    reads or writes anything but weights, and never returns before it.
    """
    card = card_of(x.device)
    has_pdl = card is not None and card.arch >= 90
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
