# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tiny random models on disk, for every family: Hugging Face folders and GGUF files.

Weights are drawn so that attention is peaked and every parameter matters: q and k are scaled up,
norms and biases are random. All have a tokenizer and a chat template, so that they can be served.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
VOCAB_SIZE = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_ID = 2  # <|im_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The quick brown fox jumps over the lazy dog, while the server answers the client in tokens. "
    "Was it the first request, or the last one? It was the best of times; numbers like 12345 and "
    "words like extraordinary are split into pieces. "
)
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
_FAMILY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 32, "sliding_window": 24}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
}


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A random transformers model in float32, with `overrides` on its config."""
    config_name, model_name, own = _FAMILY[family]
    fields = _COMMON | own | overrides
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    config = getattr(transformers, config_name)(**fields)
    config.architectures = [model_name]
    model = getattr(transformers, model_name)(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith("norm.weight"):
                center = 0.0 if family == "gemma3" else 1.0
                center += ".q_norm." in name or ".k_norm." in name
                param.copy_(center + 0.2 * noise)
            elif name.endswith("bias"):
                param.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                param.copy_(noise)
            else:
                gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
                param.copy_(noise * gain / param.shape[1] ** 0.5)
    return model


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE, about 350 tokens; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(id): {"content": text, "special": True} for id, text in enumerate(SPECIAL)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_model(
    folder: Path, family: str, *, sharded: bool = False, seed: int = 0, **overrides: Any
) -> Path:
    """A Hugging Face folder of `family` (one of FAMILIES); `overrides` go to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, seed=seed, **overrides)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=EOS_ID, pad_token_id=0
    )
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    write_tokenizer(folder)
    return folder


def write_tiny_gguf(
    path: Path, family: str, *, quant: str = "Q8_0", seed: int = 0, split: int = 0, **overrides: Any
) -> Path:
    """A GGUF file of `family` (one of GGUF_FAMILIES), as llama.cpp's converter lays it out.

    Matrices are of type `quant` (one that the gguf package can write), vectors F32. `split` is the
    most tensors in one file; then the first file's path comes back.
    """
    model = tiny_model(family, seed=seed, **overrides)
    writer = gguf.GGUFWriter(path, family, split_max_tensors=split)
    _write_metadata(writer, model.config, family)
    _write_tokenizer_metadata(writer, family)
    kind = gguf.GGMLQuantizationType[quant]
    for name, values in _gguf_tensors(model, family):
        wide = values.ndim > 1
        qtype = kind if wide else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def _write_metadata(writer: gguf.GGUFWriter, config: Any, family: str) -> None:
    writer.add_name(f"tiny {family}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(3)
        writer.add_attention_scale(config.query_pre_attn_scalar**-0.5)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_tokenizer_metadata(writer: gguf.GGUFWriter, family: str) -> None:
    if family == "gemma3":
        _write_sentencepiece(writer)
        return
    state = json.loads(tiny_tokenizer().to_str())
    vocab = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    types = [gguf.TokenType.CONTROL] * len(SPECIAL)
    types += [gguf.TokenType.NORMAL] * (len(vocab) - len(SPECIAL))
    padding = [f"[PAD{id}]" for id in range(len(vocab), VOCAB_SIZE)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab + padding)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(padding))
    merges = state["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """SentencePiece BPE with byte fallback, as Gemma's files have it."""
    control = ["<pad>", "<|im_start|>", "<|im_end|>", "<bos>", "<eos>"]
    tokens = [*control, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted({piece for word in _TEXT.split() for piece in _prefixes("\u2581" + word)})
    pieces = sorted(pieces, key=len)[: VOCAB_SIZE - len(tokens)]
    types = [gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.UNKNOWN]
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + pieces)
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    writer.add_eot_token_id(EOS_ID)
    writer.add_unk_token_id(5)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ bos_token }}" + CHAT_TEMPLATE)


def _prefixes(word: str) -> list[str]:
    return list(word) + [word[:end] for end in range(2, len(word) + 1)]


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _gguf_tensors(model: transformers.PreTrainedModel, family: str) -> list[tuple[str, np.ndarray]]:
    names = _NAMES | (_GEMMA_NAMES if family == "gemma3" else {})
    config, tensors = model.config, []
    for full_name, param in model.named_parameters():
        values = param.detach().numpy()
        path, _, suffix = full_name.rpartition(".")
        prefix = ""
        if path.startswith("model.layers."):
            index, _, path = path.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{index}."
        if family == "llama" and path in ("self_attn.q_proj", "self_attn.k_proj"):
            of_query = path == "self_attn.q_proj"
            heads = config.num_attention_heads if of_query else config.num_key_value_heads
            halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if family == "gemma3" and path.endswith("norm"):
            values = values + np.float32(1)
        tensors.append((f"{prefix}{names[path]}.{suffix}", np.ascontiguousarray(values)))
    return tensors
