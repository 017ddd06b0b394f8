# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest
import torch

from llmserve.core.kv_spec import FullAttentionSpec, SlidingWindowSpec
from llmserve.errors import ConfigError
from llmserve.models.common import Fields, read_decoder

GOOD = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
    ],
)
def test_bad_field_is_named(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_decoder(Fields(GOOD | changes))


def test_defaults() -> None:
    config = read_decoder(Fields(GOOD))
    assert config.head_dim == 16 and config.num_kv_heads == 4 and config.scale == 0.25
    assert config.eps == 1e-6 and config.activation == "silu" and not config.tied
    assert config.windows == (None, None, None)


def test_window_decides_what_a_layer_keeps() -> None:
    config = read_decoder(Fields(GOOD), windows=(None, 8, None))
    assert config.kv_spec(0, torch.bfloat16) == FullAttentionSpec(4, 16, 2)
    assert config.kv_spec(1, torch.float32) == SlidingWindowSpec(4, 16, 4, 8)
    assert [config.shape(layer).window for layer in range(3)] == [None, 8, None]


@pytest.mark.parametrize("types", ["full_attention", ["full_attention"], ["x"] * 3])
def test_bad_layer_types(types: object) -> None:
    with pytest.raises(ConfigError, match="layer_types must have 3 entries"):
        Fields({"layer_types": types}).layer_types(3)
