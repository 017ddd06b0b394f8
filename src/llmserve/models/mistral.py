# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Mistral 7B and Nemo."""

from llmserve.models.common import DecoderConfig, Fields, PreNormForCausalLM, read_decoder


class MistralForCausalLM(PreNormForCausalLM):
    """Llama with one window in every layer."""

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        windows = (fields.window(),) * fields.num_layers()
        return read_decoder(fields, windows=windows)
