# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rope tables for every scaling that config/rope.py lets through.

dynamic and longrope depend on the length of a sequence, but cached keys cannot be rotated again
when it grows. Here the length is fixed: `max_model_len`, whatever a request's own length (as vLLM
does for longrope). A context no longer than the trained one is thus computed without scaling, and
a sequence of exactly `max_model_len` tokens as transformers does.
Formulas: YaRN arXiv:2309.00071, LongRoPE arXiv:2402.13753; llama3 is Meta's Llama 3.1 release.
"""

import math
from typing import Any, NoReturn

import torch

from llmserve.errors import ConfigError
from llmserve.utils.guard import guarded


def cos_sin_cache(
    rope: dict[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    max_model_len: int,
    device: torch.device,
) -> torch.Tensor:
    """float32 [max_model_len, head_dim]: cosines, then sines, both times the attention factor.

    `rope` is one normalized set of rope parameters (config/rope.py).
    """
    inv_freq, factor = guarded(
        lambda: inverse_frequencies(rope, head_dim, max_position_embeddings, max_model_len),
        lambda error: _refuse(rope, error),
    )
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), inv_freq)
    return (torch.cat((angles.cos(), angles.sin()), -1) * factor).to(device)


def _refuse(rope: dict[str, Any], error: Exception) -> NoReturn:
    raise ConfigError(f"config.json: rope parameters {rope} cannot be used: {error}") from None


def inverse_frequencies(
    rope: dict[str, Any], head_dim: int, max_position_embeddings: int, max_model_len: int
) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2] and the factor on cosines and sines."""
    kind, base = rope["rope_type"], rope["rope_theta"]
    if kind == "dynamic":
        stretch = rope["factor"] * max(max_model_len, max_position_embeddings)
        stretch = stretch / max_position_embeddings - (rope["factor"] - 1)
        base = base * stretch ** (head_dim / (head_dim - 2))
    wavelengths = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "linear":
        return 1.0 / wavelengths / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(rope, 1.0 / wavelengths), 1.0
    if kind == "yarn":
        return _yarn(rope, wavelengths, head_dim)
    if kind == "longrope":
        return _longrope(rope, wavelengths, max_position_embeddings, max_model_len)
    return 1.0 / wavelengths, 1.0


def _llama3(rope: dict[str, Any], inv_freq: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / rope["factor"] + smooth * inv_freq


def _yarn(
    rope: dict[str, Any], wavelengths: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, float]:
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def dim_of(turns: float) -> float:
        """The dimension that turns this often over the trained length."""
        return (head_dim * math.log(trained / (turns * 2 * math.pi))) / (
            2 * math.log(rope["rope_theta"])
        )

    low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    interpolated = ramp.clamp(0.0, 1.0)
    inv_freq = interpolated / (factor * wavelengths) + (1 - interpolated) / wavelengths
    return inv_freq, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    if (given := rope.get("attention_factor")) is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


def _longrope(
    rope: dict[str, Any],
    wavelengths: torch.Tensor,
    max_position_embeddings: int,
    max_model_len: int,
) -> tuple[torch.Tensor, float]:
    trained = rope["original_max_position_embeddings"]
    factors = rope["long_factor" if max_model_len > trained else "short_factor"]
    inv_freq = 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        factor = rope.get("factor") or max_position_embeddings / trained
        attention_factor = (
            1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        )
    return inv_freq, float(attention_factor)
