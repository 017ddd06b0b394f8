# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights out of thin air, for measuring without a checkpoint."""

import zlib

import torch
from torch import nn

from llmserve.layers.norm import RMSNorm

_BOUND = 1e-3


def fill_dummy(model: nn.Module) -> None:
    """Uniform in +-1e-3, the same each time; norms multiply by 1.

    Never zeros: they would make every path look right and every token equal.
    """
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                param.data.fill_(1.0 - module.offset)
                continue
            seed = zlib.crc32(f"{path}.{name}".encode())
            generator = torch.Generator(param.device).manual_seed(seed)
            if param.is_floating_point() and param.itemsize > 1:
                param.data.uniform_(-_BOUND, _BOUND, generator=generator)
            else:
                # Few-bit types know no uniform_, and +-1e-3 would round to nothing in them.
                values = torch.rand(param.shape, generator=generator, device=param.device)
                param.data.copy_(values - 0.5)
