# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Triton where it is installed; a CPU install has none and uses the torch references alone.

Arguments that change from step to step are not specialized on (a value of 1, multiples of 16,
aligned addresses): each such case would be compiled when it first comes up, while serving.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

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
    def loop(start: Any, end: Any) -> range:
        """tl.range over interpreted scalars."""
        return range(
            *(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in (start, end))
        )


def use_triton(x: torch.Tensor) -> bool:
    """Whether `x` goes to a Triton kernel: on a GPU, and everywhere in the interpreter."""
    return x.is_cuda or envs.TRITON_INTERPRET


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_of(x: torch.Tensor) -> dict[str, bool]:
    """Launch arguments for programmatic dependent launch where `x`'s device has it: a kernel then
    starts while the one before it ends. Such a kernel calls gdc_wait in every program before it
    reads or writes anything but weights, and never returns before it.
    """
    return {"PDL": True, "launch_pdl": True} if _has_pdl(x.device) else {"PDL": False}


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
