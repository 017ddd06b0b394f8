# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Qwen3, dense."""

from llmserve.models.common import (
    DecoderConfig,
    Fields,
    PreNormForCausalLM,
    qwen_windows,
    read_decoder,
)


class Qwen3ForCausalLM(PreNormForCausalLM):
    """Llama with q and k normalized per head, and head_dim apart from hidden_size."""

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        attention_bias = fields.flag("attention_bias", False)
        return read_decoder(
            fields,
            default_head_dim=128,
            qk_norm=True,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            windows=qwen_windows(fields),
        )
