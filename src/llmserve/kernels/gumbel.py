# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Counter-based Gumbel noise: a function of (seed, output index, token id) and of nothing else.

Integer hashing (the finalizer of splitmix64: Steele, Lea, Flood 2014) gives the same 32 bits on
every device; only the two logarithms behind it may differ in their last bits. First for torch, then
as functions that other kernels call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmserve.kernels.triton_jit import tl, triton


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MUL_1 = _signed(0xBF58476D1CE4E5B9)
_MUL_2 = _signed(0x94D049BB133111EB)
_LOW_32 = 0xFFFFFFFF
# float32 rounds the highest 128 of the 2^32 values to 1, whose logarithm would be infinite
_MAX_UNIFORM = 1 - 2**-24


def _mix_(z: Tensor) -> Tensor:
    # int64 shifts are arithmetic: the masks make them logical
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= _MUL_1
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= _MUL_2
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def row_keys(seeds: Tensor, output_index: Tensor) -> Tensor:
    """int64 [n] keys of the draws number `output_index` int64 [n] of `seeds` int64 [n]."""
    return _mix_(_mix_(seeds + _GAMMA) + (output_index + 1) * _GAMMA)


def random_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """32 random bits as int64, of the broadcast shape of `keys` and `token_ids` (both int64)."""
    return _mix_(keys + (token_ids + 1) * _GAMMA).bitwise_and_(_LOW_32)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """float32 standard Gumbel noise, -log(E) with E = -log1p(-u), of the broadcast shape.

    Large values, which win draws, come from small u and keep their full relative precision: the
    largest is 22.9, with probability 2^-32. Values below -1, which lose, lose digits.
    """
    minus_u = random_bits(keys, token_ids).to(torch.float32).add_(0.5).mul_(-(2**-32))
    return minus_u.clamp_(min=-_MAX_UNIFORM).log1p_().neg_().log_().neg_()


@triton.jit
def mix_triton(z):
    """`_mix_` of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def row_key_triton(seed, output_index):
    """uint64 `row_keys` of int64."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    start = mix_triton(seed.to(tl.uint64) + gamma)
    return mix_triton(start + (output_index + 1).to(tl.uint64) * gamma)


@triton.jit
def gumbel_triton(key, token_ids):
    """float32 `gumbel` of a uint64 key and int32 token ids."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    z = mix_triton(key + (token_ids + 1).to(tl.uint64) * gamma)
    y = ((z & 0xFFFFFFFF).to(tl.uint32).to(tl.float32) + 0.5) * -2.3283064365386963e-10
    y = tl.maximum(y, -0.999999940395355224609375)
    # log1p(y) as Kahan does it: w - 1 is exact and makes up for the rounding of 1 + y
    w = 1.0 + y
    rounded = tl.where(w == 1.0, -1.0, w - 1.0)
    exponential = -tl.where(w == 1.0, y, tl.log(w) * (y / rounded))
    return -tl.log(exponential)
