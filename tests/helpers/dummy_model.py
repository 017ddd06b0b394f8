# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A model of one config.json and a tokenizer, its weights dummies: an engine of it on a GPU."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.engine import Engine
from tests.helpers.tiny_models import VOCAB_SIZE, write_tokenizer

_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCAB_SIZE,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def write_dummy_model(folder: Path, **overrides: Any) -> Path:
    """The folder; `overrides` go to config.json."""
    (folder / "config.json").write_text(json.dumps(_CONFIG | overrides))
    write_tokenizer(folder)
    return folder


def gpu_engine(folder: Path, **flags: Any) -> Engine:
    """An engine of it in this process, on the GPU."""
    defaults = {
        "device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "cpu_threads": None,
        "kv_cache_memory_bytes": 1 << 28, "max_model_len": 1024,
    }  # fmt: skip
    return Engine(folder, **(defaults | flags))
