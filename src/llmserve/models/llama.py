# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Llama 2 and 3.x, and what shares their config (SmolLM2)."""

from llmserve.models.common import DecoderConfig, Fields, PreNormForCausalLM, read_decoder


class LlamaForCausalLM(PreNormForCausalLM):
    """Full attention; biases where the config has them."""

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        attention_bias = fields.flag("attention_bias", False)
        return read_decoder(
            fields,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias", False),
        )
