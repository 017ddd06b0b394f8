# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Compiles Triton kernels for GPUs that are not there."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmserve.kernels.paged_attention import SHARED_MEMORY_LIMIT

ARCHITECTURES = (90, 120)
_SHARED_MEMORY = {90: 232_448, 120: SHARED_MEMORY_LIMIT}  # bytes a block, CUDA guide


def compile_for(
    arch: int, kernel: Any, types: dict[str, str], warps: int = 4, stages: int = 2, **constants: Any
) -> None:
    """`types` name Triton types of some arguments; the rest are int64 strides, but for the
    arguments given in `constants`. Asserts that a block fits the GPU's shared memory.
    """
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i64")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert compiled.metadata.shared <= _SHARED_MEMORY[arch]
