# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Gemma 3, text: five sliding layers to a full one, a rope for each, norms around both blocks."""

from typing import ClassVar

import torch
from torch import nn

from llmserve.config.hf import ModelDescription
from llmserve.errors import ConfigError
from llmserve.layers.base import Block, Build
from llmserve.layers.embedding import Embedding, LMHead
from llmserve.layers.forward_batch import ForwardBatch
from llmserve.layers.mlp import GatedMLP
from llmserve.layers.norm import RMSNorm
from llmserve.layers.rotary import cos_sin_cache
from llmserve.models.common import PACKED, Decoder, DecoderConfig, Fields, SelfAttention
from llmserve.models.interfaces import CausalLM


class Gemma3Layer(Block):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(
        self, config: DecoderConfig, build: Build, layer_id: int, cos_sin: torch.Tensor
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.eps
        self.self_attn = SelfAttention(config, build, layer_id, cos_sin)
        self.mlp = GatedMLP(build, hidden, config.intermediate_size, config.activation)
        self.input_layernorm = RMSNorm(build, hidden, eps, config.norm_offset)
        self.post_attention_layernorm = RMSNorm(build, hidden, eps, config.norm_offset)
        self.pre_feedforward_layernorm = RMSNorm(build, hidden, eps, config.norm_offset)
        self.post_feedforward_layernorm = RMSNorm(build, hidden, eps, config.norm_offset)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        mixed = self.self_attn(x, self.input_layernorm.spec, batch)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(x, self.pre_feedforward_layernorm.spec))


class Gemma3ForCausalLM(CausalLM):
    """The text model; a multimodal checkpoint's vision tensors are left out."""

    PACKED: ClassVar[dict[str, tuple[str, ...]]] = PACKED
    RENAME: ClassVar[dict[str, str | None]] = {
        "language_model.": "",
        "model.language_model.": "model.",
        "vision_tower.": None,
        "model.vision_tower.": None,
        "multi_modal_projector.": None,
        "model.multi_modal_projector.": None,
    }

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        """The family's config reading."""
        if fields.flag("use_bidirectional_attention", False):
            raise ConfigError("config.json: use_bidirectional_attention is not supported")
        # Defaults are transformers': the published configs leave them out.
        num_layers = fields.num_layers(26)
        window = fields.count("sliding_window", 4096)
        pattern = fields.count("sliding_window_pattern", 6)
        types = fields.layer_types(num_layers) or [
            "sliding_attention" if (layer_id + 1) % pattern else "full_attention"
            for layer_id in range(num_layers)
        ]
        attention_bias = fields.flag("attention_bias", False)
        return DecoderConfig(
            vocab_size=fields.count("vocab_size", 262_208),
            hidden_size=fields.count("hidden_size", 2304),
            intermediate_size=fields.count("intermediate_size", 9216),
            num_heads=fields.count("num_attention_heads", 8),
            num_kv_heads=fields.count("num_key_value_heads", 4),
            head_dim=fields.count("head_dim", 256),
            eps=fields.number("rms_norm_eps", 1e-6),
            activation=fields.activation("hidden_activation", "gelu_pytorch_tanh"),
            tied=fields.flag("tie_word_embeddings", True),
            scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            windows=tuple(window if kind == "sliding_attention" else None for kind in types),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            qk_norm=True,
            norm_offset=1.0,
            attention_softcap=fields.optional_number("attn_logit_softcapping"),
        )

    def __init__(self, description: ModelDescription, build: Build) -> None:
        super().__init__()
        fields = Fields(description.hf_config)
        config = self.read(fields)
        tables = {
            kind: cos_sin_cache(
                rope,
                config.head_dim,
                fields.count("max_position_embeddings", 131_072),
                build.max_model_len,
                build.device,
            )
            for kind, rope in description.hf_config["rope_parameters"].items()
        }
        layers: list[nn.Module] = [
            Gemma3Layer(
                config,
                build,
                layer_id,
                tables["full_attention" if window is None else "sliding_attention"],
            )
            for layer_id, window in enumerate(config.windows)
        ]
        self.model = Decoder(
            Embedding(build, config.vocab_size, config.hidden_size, config.hidden_size**0.5),
            layers,
            RMSNorm(build, config.hidden_size, config.eps, config.norm_offset),
        )
        self.lm_head = LMHead(build, self.model.embed_tokens, config.tied)
        self.softcap = fields.optional_number("final_logit_softcapping")
        layer_ids = range(len(config.windows))
        self.kv_specs = [config.kv_spec(layer_id, build.dtype) for layer_id in layer_ids]
        self.attention_shapes = [config.shape(layer_id) for layer_id in layer_ids]
        self.logits_width = config.vocab_size

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self.model(batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head.logits(hidden)
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap
