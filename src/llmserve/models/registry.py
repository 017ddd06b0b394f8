# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Architectures of config.json to their classes."""

from llmserve.utils.registry import Registry

MODELS = Registry(
    "model architecture",
    {
        "LlamaForCausalLM": "llmserve.models.llama:LlamaForCausalLM",
        "MistralForCausalLM": "llmserve.models.mistral:MistralForCausalLM",
        "Qwen2ForCausalLM": "llmserve.models.qwen2:Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "llmserve.models.qwen3:Qwen3ForCausalLM",
        "Gemma3ForCausalLM": "llmserve.models.gemma3:Gemma3ForCausalLM",
    },
)
