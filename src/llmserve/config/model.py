# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Which model, and how its numbers are read."""

import math
from dataclasses import dataclass
from typing import Any

from llmserve.config.flag import check_all, flag, size

GRAMMAR_BACKENDS = ("auto", "xgrammar", "guidance")


SAMPLING_DEFAULTS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
)  # fmt: skip


def sampling_defaults_complaint(value: dict[str, Any]) -> str | None:
    """What is wrong with sampling defaults, or None."""
    for name, number in value.items():
        if name not in SAMPLING_DEFAULTS:
            return f"knows {', '.join(SAMPLING_DEFAULTS)}"
        if type(number) not in (int, float) or not math.isfinite(number):
            return f"{name} must be a number"
    return None


def _context(text: str) -> int:
    return -1 if text in ("auto", "-1") else size(text)


def _context_check(value: int) -> str | None:
    return None if value == -1 or value >= 1 else "must be a number of tokens, or auto"


def _structured_outputs_check(value: dict[str, Any]) -> str | None:
    known: dict[str, tuple[Any, ...]] = {
        "backend": GRAMMAR_BACKENDS,
        "disable_any_whitespace": (False, True),
        "disable_additional_properties": (False, True),
    }
    for key, given in value.items():
        if key not in known:
            return f"knows {', '.join(known)}"
        if given not in known[key]:
            return f"{key} must be one of {', '.join(map(str, known[key]))}"
    return None


@dataclass(frozen=True)
class ModelConfig:
    """Model, tokenizer and generation defaults."""

    model: str = flag("", "Hugging Face id, folder or .gguf file; empty serves the demo model.")
    served_model_name: list[str] = flag(
        [], "Names the API answers to; the first is shown.", repeat=True
    )
    tokenizer: str | None = flag(None, "Tokenizer folder or id, where it is not the model's.")
    revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    hf_token: str | None = flag(None, "Token for gated repositories; default is HF_TOKEN.")
    trust_remote_code: bool = flag(
        False, "Not supported: model code from a repository is never run."
    )
    dtype: str = flag(
        "auto",
        "Weights and activations. auto: the model's own on a GPU; on a CPU bfloat16 where that is "
        "fast, else float32.",
        choices=("auto", "float32", "float16", "bfloat16", "half", "float"),
    )
    max_model_len: int | None = flag(
        None, "Context length; auto is the largest that fits.", check=_context_check, parse=_context
    )
    hf_overrides: dict[str, Any] = flag({}, "JSON merged into the model's config.json.")
    generation_config: str = flag(
        "auto", "Sampling defaults: auto is the model's own, vllm is none, or a folder."
    )
    override_generation_config: dict[str, Any] = flag(
        {}, "JSON merged into the sampling defaults.", check=sampling_defaults_complaint
    )
    seed: int = flag(0, "Seed of requests that bring none.")
    skip_tokenizer_init: bool = flag(False, "Token ids in, token ids out; no tokenizer is read.")
    max_logprobs: int = flag(20, "Most log-probabilities a request may ask for; -1 is no limit.")
    logprobs_mode: str = flag(
        "raw_logprobs",
        "Before (raw) or after (processed) penalties, bias and temperature.",
        choices=("raw_logprobs", "processed_logprobs"),
    )
    logits_processors: list[str] = flag(
        [], "Own logits processors as package.module:Class, loaded at start.", repeat=True
    )
    structured_outputs_config: dict[str, Any] = flag(
        {},
        "JSON: backend (xgrammar, guidance, or auto, which is xgrammar and guidance for what "
        "xgrammar cannot enforce), disable_any_whitespace, disable_additional_properties.",
        check=_structured_outputs_check,
    )
    quantization: str | None = flag(None, "Not supported yet.", short="-q")

    def __post_init__(self) -> None:
        check_all(self)
