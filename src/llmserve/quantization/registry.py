# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Quantization methods by name."""

from llmserve.utils.registry import Registry

QUANTIZATIONS = Registry(
    "quantization", {"unquantized": "llmserve.quantization.unquantized:UnquantizedLinear"}
)
