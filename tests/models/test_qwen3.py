# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from llmserve.models.common import Fields
from llmserve.models.qwen3 import Qwen3ForCausalLM

GOOD = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_head_dim_is_not_derived_from_the_hidden_size() -> None:
    config = Qwen3ForCausalLM.read(Fields(GOOD))
    assert config.head_dim == 128 and config.scale == 128**-0.5
    assert config.qk_norm and not config.qkv_bias
