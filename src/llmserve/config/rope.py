# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Rope parameters and context length, out of the two forms that config.json has had."""

import math
from typing import Any

from llmserve.errors import ConfigError

# What each rope type cannot do without, besides rope_theta; layers/rotary.py computes them.
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_THETA = 10_000.0
# transformers' defaults, which published Gemma 3 configs leave out.
_GEMMA_THETA = 1_000_000.0
_GEMMA_LENGTH = 131_072
_MAX_LENGTH = 1 << 30  # positions are int32
_TRAINED_LENGTH = ("yarn", "longrope", "llama3")


def normalize(config: dict[str, Any]) -> dict[str, Any]:
    """The value of "rope_parameters" that `ModelDescription.hf_config` promises.

    Reads transformers 5's `rope_parameters` (flat, or a dict per layer type) and transformers 4's
    `rope_theta`, `rope_scaling` (type under "rope_type" or "type") and `rope_local_base_freq`.
    """
    given = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not isinstance(given, dict) or not isinstance(scaling, dict):
        raise ConfigError("config.json: rope_parameters and rope_scaling must be objects")
    if config.get("model_type") == "gemma3_text":
        full, sliding = given.get("full_attention") or {}, given.get("sliding_attention") or {}
        if not isinstance(full, dict) or not isinstance(sliding, dict):
            raise ConfigError("config.json: rope_parameters of a layer type must be an object")
        theta = config.get("rope_theta", _GEMMA_THETA)
        local = config.get("rope_local_base_freq", _THETA)
        return {
            "full_attention": _one(config, full | scaling, theta),
            "sliding_attention": _one(config, sliding, local),
        }
    theta = given.get("rope_theta") or config.get("rope_theta") or _THETA
    return _one(config, scaling or given, theta)


def _one(config: dict[str, Any], given: dict[str, Any], theta: float) -> dict[str, Any]:
    rope = {key: value for key, value in given.items() if key != "type"}
    kind = given.get("rope_type") or given.get("type") or "default"
    rope["rope_type"] = kind = "longrope" if kind == "su" else kind
    rope.setdefault("rope_theta", theta)
    if kind in _TRAINED_LENGTH:
        # Phi-3 and its kin keep it outside; there it wins.
        trained = config.get("original_max_position_embeddings")
        if trained is not None:
            rope["original_max_position_embeddings"] = trained
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise ConfigError(f"rope type {kind!r} is not supported (known: {', '.join(REQUIRED)})")
    for key in ("rope_theta", *REQUIRED[kind]):
        if rope.get(key) is None:
            raise ConfigError(f"config.json: rope type {kind!r} needs {key}")
        if key.endswith("factor") and isinstance(rope[key], list):
            numbers = rope[key]
        else:
            numbers = [rope[key]]
        for number in numbers:
            if type(number) not in (int, float) or not 0 < number < math.inf:
                raise ConfigError(
                    f"config.json: rope type {kind!r}: {key} must be positive, got {number!r}"
                )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor {partial} is not supported")
    return rope


def context_length(config: dict[str, Any]) -> int:
    """Tokens that a normalized config supports.

    `max_position_embeddings` times the factor of linear, dynamic and yarn scaling (yarn from the
    length it was trained on); longrope, llama3 and Gemma 3 state the scaled length already.
    """
    default = _GEMMA_LENGTH if config.get("model_type") == "gemma3_text" else None
    length = config.get("max_position_embeddings", default)
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"config.json: max_position_embeddings must be a count, got {length!r}")
    rope = config["rope_parameters"]
    if rope.get("rope_type") in ("linear", "dynamic"):  # Gemma 3 has one for each kind of layer
        length = int(length * rope["factor"])
    if rope.get("rope_type") == "yarn":
        length = int(rope["original_max_position_embeddings"] * rope["factor"])
    if length > _MAX_LENGTH:
        raise ConfigError(f"config.json: a context of {length} tokens is over {_MAX_LENGTH}")
    return length
