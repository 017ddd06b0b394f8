# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention backends; the order is the automatic choice."""

import torch

from llmserve.attention.base import AttentionBackend, AttentionShape
from llmserve.errors import ConfigError
from llmserve.utils.registry import Registry

ATTENTION = Registry(
    "attention backend",
    {
        "flashinfer": "llmserve.attention.flashinfer:FlashInferAttention",
        "triton_paged": "llmserve.attention.triton_paged:TritonPagedAttention",
        "torch": "llmserve.attention.torch_sdpa:TorchAttention",
    },
)


def choose(
    shape: AttentionShape, dtype: torch.dtype, family: int, requested: str | None
) -> type[AttentionBackend]:
    """The backend for layers of `shape` on compute capability `family`.x (0 is the CPU).

    ConfigError says why `requested` does not fit, or why none does.
    """
    reasons = {}
    for name in [requested] if requested else ATTENTION:
        backend: type[AttentionBackend] = ATTENTION.load(name)
        reasons[name] = _unfit(backend, shape, dtype, family)
        if reasons[name] is None:
            return backend
    raise ConfigError(
        "no attention backend fits: " + "; ".join(f"{n} has no {r}" for n, r in reasons.items()),
        param="attention_backend",
    )


def _unfit(
    backend: type[AttentionBackend], shape: AttentionShape, dtype: torch.dtype, family: int
) -> str | None:
    can = backend.capabilities
    if family not in can.families:
        where = "the CPU" if family == 0 else f"GPUs of compute capability {family}.x"
        return f"support for {where}"
    if dtype not in can.dtypes:
        return f"support for {str(dtype).removeprefix('torch.')}"
    if can.head_dims is not None and shape.head_dim not in can.head_dims:
        return f"support for head_dim {shape.head_dim}"
    if shape.window is not None and not can.window:
        return "support for sliding windows"
    if shape.softcap is not None and not can.softcap:
        return "support for a logits softcap"
    return backend.missing(shape, dtype, family)
