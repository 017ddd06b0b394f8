# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Blocks and config reading that families share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmserve.attention.base import AttentionShape
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import AnyKVSpec, FullAttentionSpec, SlidingWindowSpec
from llmserve.errors import ConfigError
from llmserve.layers.attention import Attention
from llmserve.layers.base import Block, Build
from llmserve.layers.embedding import Embedding, LMHead
from llmserve.layers.forward_batch import ForwardBatch
from llmserve.layers.linear import Linear
from llmserve.layers.mlp import GatedMLP
from llmserve.layers.norm import RMSNorm
from llmserve.layers.rotary import cos_sin_cache
from llmserve.models.interfaces import CausalLM
from llmserve.quantization.base import NormSpec

PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_MAX_LAYERS = 1000
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Fields:
    """Typed reading of config.json; ConfigError names the key and what it should be."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1 that fits int32; required where there is no default."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ConfigError(f"config.json: {key} must be a positive integer, got {value!r}")
        return value

    def num_layers(self, default: int | None = None) -> int:
        """`num_hidden_layers`, which must be one that can be built."""
        value = self.count("num_hidden_layers", default)
        if value > _MAX_LAYERS:
            raise ConfigError(
                f"config.json: num_hidden_layers must be at most {_MAX_LAYERS}, got {value}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; required where there is no default."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"config.json: {key} must be a positive number, got {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive number, or None where it is null or absent."""
        return None if self.config.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def window(self) -> int | None:
        """`sliding_window`: 4096 where it is absent, None where it is null."""
        if "sliding_window" in self.config and self.config["sliding_window"] is None:
            return None
        return self.count("sliding_window", 4096)

    def activation(self, key: str, default: str) -> str:
        """The kernel's name of a gated activation."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise ConfigError(
                f"config.json: {key} {value!r} is not supported (known: {', '.join(_ACTIVATIONS)})"
            )
        return _ACTIVATIONS[value]

    def layer_types(self, num_layers: int) -> list[str] | None:
        """One of full_attention, sliding_attention for each layer, or None where not given."""
        types = self.config.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(types, list)
            or len(types) < num_layers
            or not all(kind in known for kind in types)
        ):
            raise ConfigError(
                f"config.json: layer_types must have {num_layers} entries of {', '.join(known)}"
            )
        return types[:num_layers]

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json has no {key}")
        return value


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder with rope, RMSNorm and a gated MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    activation: str
    tied: bool
    scale: float  # of attention scores
    windows: tuple[int | None, ...]  # by layer
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    attention_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even, got {self.head_dim}")

    def shape(self, layer_id: int) -> AttentionShape:
        """What the attention backend of one layer is made for."""
        return AttentionShape(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.scale,
            self.windows[layer_id],
            self.attention_softcap,
        )

    def kv_spec(self, layer_id: int, dtype: torch.dtype) -> AnyKVSpec:
        """What one layer keeps in the cache."""
        window = self.windows[layer_id]
        if window is None:
            return FullAttentionSpec(self.num_kv_heads, self.head_dim, dtype.itemsize)
        return SlidingWindowSpec(self.num_kv_heads, self.head_dim, dtype.itemsize, window)


class SelfAttention(Block):
    """qkv_proj, attention, o_proj under the checkpoint's names."""

    def __init__(
        self, config: DecoderConfig, build: Build, layer_id: int, cos_sin: torch.Tensor
    ) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.qkv_proj = Linear(build, hidden, (q_size, kv_size, kv_size), config.qkv_bias)
        self.o_proj = Linear(build, q_size, (hidden,), config.o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(build, head_dim, config.eps, config.norm_offset)
            self.k_norm = RMSNorm(build, head_dim, config.eps, config.norm_offset)
        self.attention = Attention(layer_id, config.shape(layer_id), cos_sin)

    def forward(
        self,
        x: torch.Tensor,
        norm: NormSpec,
        batch: ForwardBatch,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[num_tokens, hidden] -> the same, `norm` applied first and `residual` added last."""
        mixed = self.attention(self.qkv_proj(x, norm), batch, self.q_norm, self.k_norm)
        return self.o_proj(mixed, residual=residual)


class PreNormLayer(Block):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: DecoderConfig, build: Build, layer_id: int, cos_sin: torch.Tensor
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, build, layer_id, cos_sin)
        self.mlp = GatedMLP(
            build,
            config.hidden_size,
            config.intermediate_size,
            config.activation,
            config.mlp_bias,
        )
        self.input_layernorm = RMSNorm(build, config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(build, config.hidden_size, config.eps)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = self.self_attn(x, self.input_layernorm.spec, batch, residual=x)
        return self.mlp(x, self.post_attention_layernorm.spec, residual=x)


class Decoder(Block):
    """Embedding, layers and the final norm; the checkpoint's `model.`."""

    def __init__(self, embed_tokens: Embedding, layers: list[nn.Module], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """-> final hidden states [num_tokens, hidden]."""
        x = self.embed_tokens(batch.input_ids)
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x)


class PreNormForCausalLM(CausalLM):
    """A decoder of PreNormLayers with one rope; families differ in how they read their config."""

    PACKED: ClassVar[dict[str, tuple[str, ...]]] = PACKED

    @staticmethod
    def read(fields: Fields) -> DecoderConfig:
        """The family's config reading."""
        raise NotImplementedError

    def __init__(self, description: ModelDescription, build: Build) -> None:
        super().__init__()
        fields = Fields(description.hf_config)
        config = self.read(fields)
        cos_sin = cos_sin_cache(
            description.hf_config["rope_parameters"],
            config.head_dim,
            fields.count("max_position_embeddings"),
            build.max_model_len,
            build.device,
        )
        layer_ids = range(len(config.windows))
        self.model = Decoder(
            Embedding(build, config.vocab_size, config.hidden_size),
            [PreNormLayer(config, build, layer_id, cos_sin) for layer_id in layer_ids],
            RMSNorm(build, config.hidden_size, config.eps),
        )
        self.lm_head = LMHead(build, self.model.embed_tokens, config.tied)
        self.kv_specs = [config.kv_spec(layer_id, build.dtype) for layer_id in layer_ids]
        self.attention_shapes = [config.shape(layer_id) for layer_id in layer_ids]
        self.logits_width = config.vocab_size

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self.model(batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden)


def read_decoder(fields: Fields, **family: Any) -> DecoderConfig:
    """The keys that Llama, Mistral, Qwen2 and Qwen3 name alike; `family` overrides or adds."""
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = fields.count("head_dim", family.pop("default_head_dim", hidden // heads))
    common: dict[str, Any] = {
        "vocab_size": fields.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.count("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.count("num_key_value_heads", heads),
        "head_dim": head_dim,
        "eps": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.activation("hidden_act", "silu"),
        "tied": fields.flag("tie_word_embeddings", False),
        "scale": head_dim**-0.5,
        "windows": (None,) * fields.num_layers(),
    }
    return DecoderConfig(**common | family)


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen2 and Qwen3: with `use_sliding_window`, the layers from `max_window_layers` on."""
    num_layers = fields.num_layers()
    if not fields.flag("use_sliding_window", False):
        return (None,) * num_layers
    window, first = fields.window(), fields.config.get("max_window_layers", 28)
    types = fields.layer_types(num_layers) or [
        "sliding_attention" if layer_id >= first else "full_attention"
        for layer_id in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in types)
