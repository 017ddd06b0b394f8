# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Whether there is a compiler for the CPU's kernels."""

from llmserve.kernels.cpu_build import find_compiler


def has_compiler() -> bool:
    """Of C++. That csrc/cpu_decode.cpp can then be built is for the tests to see."""
    try:
        find_compiler()
    except FileNotFoundError:
        return False
    return True
