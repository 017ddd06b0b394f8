# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights from GGUF files, dequantized by the gguf package."""

import re
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize

from llmserve.config.gguf import GGUFTensor, read_header
from llmserve.errors import ConfigError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_IN_CONFIG = ("rope_freqs.weight",)  # config/gguf.py makes rope parameters of it
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


class GGUFSource:
    """All tensors of a model's files under Hugging Face's names, as float32."""

    def __init__(self, files: list[str], hf_config: dict[str, Any]) -> None:
        self._config = hf_config
        self._arch = hf_config["model_type"]
        layer = _LAYER | (_GEMMA_LAYER if self._arch == "gemma3_text" else {})
        self._tensors: dict[str, GGUFTensor] = {}
        for tensor in read_header(files).tensors.values():
            if tensor.name in _IN_CONFIG:
                continue
            match = _NAME.fullmatch(tensor.name)
            index, stem, suffix = match.groups() if match else (None, tensor.name, "")
            ours = (_TOP if index is None else layer).get(stem, stem)
            prefix = "" if index is None else f"model.layers.{index}."
            self._tensors[f"{prefix}{ours}.{suffix}"] = tensor
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        raw = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
        try:
            # One row of blocks per row of the tensor, as the package wants it.
            values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.qtype)
        except NotImplementedError:
            raise ConfigError(
                f"{tensor.file}: tensor {tensor.name} is {tensor.qtype.name}, "
                "which cannot be dequantized"
            ) from None
        return torch.from_numpy(self._undo_conversion(name, values))

    def _undo_conversion(self, name: str, values: np.ndarray) -> np.ndarray:
        """llama.cpp's converter pairs rotated rows side by side in Llama's q and k, and adds the
        1 of Gemma's norms."""
        if self._arch == "gemma3_text" and name.endswith("norm.weight"):
            return values - np.float32(1)
        if self._arch in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
            kind = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            heads = self._config[kind]
            pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        return values
