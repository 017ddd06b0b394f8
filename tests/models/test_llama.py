# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from llmserve.models.common import Fields
from llmserve.models.llama import LlamaForCausalLM

GOOD = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_one_flag_biases_all_four_projections() -> None:
    config = LlamaForCausalLM.read(Fields(GOOD | {"attention_bias": True}))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, True, False)
    config = LlamaForCausalLM.read(Fields(GOOD | {"mlp_bias": True}))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, True)
