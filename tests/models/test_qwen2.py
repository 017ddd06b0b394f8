# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest

from llmserve.models.common import Fields
from llmserve.models.qwen2 import Qwen2ForCausalLM

GOOD = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
ON = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 8, "max_window_layers": 0}, (None, None, None)),
        (ON | {"max_window_layers": 1}, (None, 8, 8)),
        (ON, (None, None, None)),  # the first 28 layers are full
        (ON | {"sliding_window": None, "max_window_layers": 0}, (None, None, None)),
        (
            ON | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            (8, None, 8),
        ),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert Qwen2ForCausalLM.read(Fields(GOOD | changes)).windows == windows


def test_only_q_k_v_have_biases() -> None:
    config = Qwen2ForCausalLM.read(Fields(GOOD))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
