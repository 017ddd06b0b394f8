# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rope tables against transformers' own functions, with a published model's parameters each."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmserve.layers.rotary import cos_sin_cache, inverse_frequencies

DIM, MAX = 128, 131072
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.5},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_all": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn_attention": {
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.25,
    },
    "longrope": {
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0 + 0.01 * i for i in range(64)],
        "long_factor": [1.1 + 0.9 * i for i in range(64)],
    },
    "longrope_factor": {
        "original_max_position_embeddings": 4096,
        "factor": 16.0,
        "short_factor": [1.0] * 64,
        "long_factor": [4.0] * 64,
    },
}


def reference(name: str, seq_len: int) -> tuple[torch.Tensor, float]:
    rope = {"rope_type": name.partition("_")[0], "rope_theta": 500_000.0} | ROPES[name]
    config = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=MAX, rope_parameters=rope
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)


@pytest.mark.parametrize("seq_len", [2048, MAX, 200_000])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name: str, seq_len: int) -> None:
    rope = {"rope_type": name.partition("_")[0], "rope_theta": 500_000.0} | ROPES[name]
    expected, factor = reference(name, seq_len)
    ours, our_factor = inverse_frequencies(rope, DIM, MAX, seq_len)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)


def test_table_is_cosines_then_sines_times_the_factor() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "attention_factor": 1.5}
    rope |= {"factor": 2.0, "original_max_position_embeddings": 64}
    table = cos_sin_cache(rope, 8, 128, 100, torch.device("cpu"))
    inv_freq, _ = inverse_frequencies(rope, 8, 128, 100)
    assert table.shape == (100, 8) and table.dtype == torch.float32
    torch.testing.assert_close(table[37, :4], 1.5 * (37 * inv_freq).cos())
    torch.testing.assert_close(table[37, 4:], 1.5 * (37 * inv_freq).sin())
