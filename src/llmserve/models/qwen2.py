# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Qwen2 and Qwen2.5."""

from llmserve.models.common import (
    DecoderConfig,
    Fields,
    PreNormForCausalLM,
    qwen_windows,
    read_decoder,
)


class Qwen2ForCausalLM(PreNormForCausalLM):
    """Llama with biases on q, k, v."""

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        return read_decoder(fields, qkv_bias=True, windows=qwen_windows(fields))
