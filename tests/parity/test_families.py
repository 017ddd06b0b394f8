# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Every family against transformers in float32, and every config field against its absence.

Prompts are longer than the window (24) and than the length that rope was trained on (32). Attention
is peaked (asserted), so that a wrong position, window or scale shows.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmserve.errors import ConfigError
from llmserve.models.registry import MODELS
from tests.helpers.run_model import description_of, load, prompt_logits, relative_error
from tests.helpers.tiny_models import FAMILIES, VOCAB_SIZE, write_tiny_model

TOLERANCE = 1e-4
LENGTHS = (90, 1, 37)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "factor": 4.0, "short_factor": [1.0 + 0.1 * i for i in range(16)],
            "long_factor": [1.5 + 0.5 * i for i in range(16)]}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
UNTIED = {"tie_word_embeddings": False}
WINDOWED = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *[(family, "plain", {}) for family in FAMILIES],
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "gelu", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", "linear", {"rope_parameters": LINEAR, "max_position_embeddings": 32}),
    ("llama", "llama3", {"rope_parameters": LLAMA3}),
    ("llama", "yarn", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    ("llama", "longrope", {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
    ("mistral", "no_window", {"sliding_window": None}),
    ("qwen2", "windowed", WINDOWED),
    ("qwen2", "yarn", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    ("qwen3", "windowed", WINDOWED),
    ("qwen3", "bias_untied", {"attention_bias": True} | UNTIED),
    ("gemma3", "scaled", {"rope_parameters": GEMMA_ROPE}),
    ("gemma3", "bias_untied", {"attention_bias": True} | UNTIED),
    ("gemma3", "softcap", {"final_logit_softcapping": 3.0}),
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.inference_mode()
def reference(folder: Path) -> list[torch.Tensor]:
    """transformers' logits of each prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    outputs = [model(torch.tensor([prompt]), output_attentions=True) for prompt in prompts()]
    peak = torch.stack([layer[0, :, 24:].amax(-1).mean() for layer in outputs[0].attentions])
    assert peak.min() > 0.3, peak  # uniform would be below 0.04
    return [output.logits[0] for output in outputs]


@pytest.mark.parametrize(
    ("family", "name", "config"), VARIANTS, ids=[f"{v[0]}-{v[1]}" for v in VARIANTS]
)
def test_logits_equal_transformers(
    tmp_path: Path, family: str, name: str, config: dict[str, Any]
) -> None:
    write_tiny_model(tmp_path, family, **config)
    expected = reference(tmp_path)
    net = load(description_of(tmp_path))
    for chunk in (None, 7):
        for ours, theirs in zip(prompt_logits(net, prompts(), chunk=chunk), expected, strict=True):
            assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_dynamic_rope_equals_transformers_at_the_full_context(tmp_path: Path, length: int) -> None:
    """The table is for max_model_len; transformers scales for the sequence that it sees."""
    write_tiny_model(tmp_path, "llama", rope_parameters=DYNAMIC, max_position_embeddings=32)
    net = load(description_of(tmp_path), max_model_len=length)
    index = LENGTHS.index(length)
    (ours,) = prompt_logits(net, [prompts()[index]])
    assert relative_error(ours, reference(tmp_path)[index]) < TOLERANCE


def test_longrope_within_the_trained_length_uses_short_factors(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", rope_parameters=LONGROPE, max_position_embeddings=128)
    net = load(description_of(tmp_path), max_model_len=32)
    prompt = prompts()[0][:32]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([prompt])).logits[0]
    (ours,) = prompt_logits(net, [prompt])
    assert relative_error(ours, theirs) < TOLERANCE
    (long,) = prompt_logits(load(description_of(tmp_path), max_model_len=33), [prompt])
    assert relative_error(long, theirs) > 100 * TOLERANCE


def test_attention_softcap_equals_transformers_where_it_is_asked_for_it(tmp_path: Path) -> None:
    """transformers reads the field but never passes it to attention; told to, it agrees."""
    write_tiny_model(tmp_path, "gemma3", attn_logit_softcapping=2.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([prompts()[0]]), softcap=2.0).logits[0]
    ours = prompt_logits(load(description_of(tmp_path)), prompts())[0]
    assert relative_error(ours, theirs) < TOLERANCE


# For each family, what it reads: key -> (config of the checkpoint, what our model reads instead).
# Where both have the same tensor shapes the logits must move, else the loader must refuse.
Mutation = tuple[dict[str, Any], dict[str, Any]]
REGROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
SIZES: dict[str, Mutation] = {
    "vocab_size": ({}, {"vocab_size": 256}),
    "hidden_size": ({}, {"hidden_size": 32}),
    "intermediate_size": ({}, {"intermediate_size": 64}),
    "num_hidden_layers": ({}, {"num_hidden_layers": 2, "layer_types": None}),
    "num_attention_heads": ({}, {"num_attention_heads": 2}),
    "num_key_value_heads": ({}, {"num_key_value_heads": 4}),
    "rms_norm_eps": ({}, {"rms_norm_eps": 0.5}),
    "tie_word_embeddings": (UNTIED, {"tie_word_embeddings": True}),
}
PRE_NORM = SIZES | {
    "hidden_act": ({}, {"hidden_act": "gelu_pytorch_tanh"}),
    "max_position_embeddings": (
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
        {"max_position_embeddings": 16},
    ),
}
HEAD_DIM: dict[str, Mutation] = {"head_dim": ({"head_dim": 32}, REGROUPED)}
BIAS: dict[str, Mutation] = {
    "attention_bias": ({"attention_bias": True}, {"attention_bias": False})
}
QWEN = {
    "use_sliding_window": (WINDOWED, {"use_sliding_window": False, "layer_types": None}),
    "sliding_window": (WINDOWED, {"sliding_window": 12}),
    "max_window_layers": (WINDOWED, {"max_window_layers": 3, "layer_types": None}),
    "layer_types": (WINDOWED, {"layer_types": ["sliding_attention"] * 3}),
}
MUTATIONS: dict[str, dict[str, Mutation]] = {
    "llama": PRE_NORM | HEAD_DIM | BIAS | {"mlp_bias": ({"mlp_bias": True}, {"mlp_bias": False})},
    "mistral": PRE_NORM | HEAD_DIM | {"sliding_window": ({}, {"sliding_window": 12})},
    # Qwen2 publishes no head_dim, yet one is read.
    "qwen2": PRE_NORM | QWEN | {"head_dim": ({}, {"num_attention_heads": 2, "head_dim": 32})},
    "qwen3": PRE_NORM | HEAD_DIM | QWEN | BIAS,
    "gemma3": SIZES
    | HEAD_DIM
    | BIAS
    | {
        "num_hidden_layers": ({}, {"num_hidden_layers": 2}),
        "hidden_activation": ({}, {"hidden_activation": "silu"}),
        "query_pre_attn_scalar": ({}, {"query_pre_attn_scalar": 96}),
        "sliding_window": ({}, {"sliding_window": 12}),
        "layer_types": ({}, {"layer_types": ["full_attention"] * 4}),
        "sliding_window_pattern": ({}, {"layer_types": None, "sliding_window_pattern": 2}),
        "final_logit_softcapping": ({}, {"final_logit_softcapping": 3.0}),
        "attn_logit_softcapping": ({}, {"attn_logit_softcapping": 2.0}),
        "use_bidirectional_attention": ({}, {"use_bidirectional_attention": True}),
        "max_position_embeddings": (
            {
                "rope_parameters": GEMMA_ROPE | {"full_attention": DYNAMIC},
                "max_position_embeddings": 64,
            },
            {"max_position_embeddings": 16},
        ),
    },
}
CASES = [(family, key) for family, keys in MUTATIONS.items() for key in keys]


class Recorded(dict[str, Any]):
    """Remembers which keys were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Checkpoints by family and config, and our logits of them, made once."""

    @cache
    def make(family: str, config: str) -> tuple[Path, list[torch.Tensor]]:
        folder = tmp_path_factory.mktemp(family)
        write_tiny_model(folder, family, **CONFIGS[config])
        return folder, prompt_logits(load(description_of(folder), max_model_len=128), prompts())

    CONFIGS: dict[str, dict[str, Any]] = {}

    def get(family: str, config: dict[str, Any]) -> tuple[Path, list[torch.Tensor]]:
        CONFIGS[repr(config)] = config
        return make(family, repr(config))

    yield get


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_read_has_a_mutation(folders: Any, family: str) -> None:
    description = description_of(folders(family, {})[0])
    read: set[str] = set()
    for extra in ({}, {"use_sliding_window": True, "layer_types": None}):
        config = Recorded(description.hf_config | extra)
        object.__setattr__(description, "hf_config", config)
        load(description, load_format="dummy")
        read |= config.read
    assert read - {"rope_parameters"} == set(MUTATIONS[family])


@pytest.mark.parametrize(("family", "key"), CASES)
def test_mutated_field_moves_logits(folders: Any, family: str, key: str) -> None:
    config, mutated = MUTATIONS[family][key]
    folder, expected = folders(family, config)
    try:
        net = load(description_of(folder, **mutated), max_model_len=128)
    except ConfigError:
        return
    if net.logits_width != VOCAB_SIZE:
        return
    moved = [
        relative_error(ours, before)
        for ours, before in zip(prompt_logits(net, prompts()), expected, strict=True)
    ]
    assert max(moved) > 100 * TOLERANCE, (moved, mutated)


ROPE_MUTATIONS = [
    (rope, key, value)
    for rope, changes in (
        ({"rope_type": "default", "rope_theta": 1e4}, {"rope_theta": 2e4}),
        (LINEAR, {"rope_theta": 2e4, "factor": 2.0, "rope_type": "default"}),
        (DYNAMIC, {"rope_theta": 2e4, "factor": 9.0, "rope_type": "linear"}),
        (
            YARN,
            {
                "rope_theta": 2e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.5,
                "beta_fast": 2,
                "beta_slow": 0.2,
                "truncate": False,
            },
        ),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 2.0}, {"mscale": 2.0, "mscale_all_dim": 1.0}),
        (
            LLAMA3,
            {
                "rope_theta": 2e4,
                "factor": 2.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (
            LONGROPE,
            {
                "rope_theta": 2e4,
                "long_factor": [2.0] * 16,
                "attention_factor": 1.5,
                "factor": 16.0,
                "original_max_position_embeddings": 200,
            },
        ),
    )
    for key, value in changes.items()
]


@pytest.mark.parametrize(
    ("rope", "key", "value"),
    ROPE_MUTATIONS,
    ids=[f"{rope['rope_type']}-{key}" for rope, key, _ in ROPE_MUTATIONS],
)
def test_mutated_rope_moves_logits(
    folders: Any, rope: dict[str, Any], key: str, value: Any
) -> None:
    folder, expected = folders("llama", {"rope_parameters": rope, "max_position_embeddings": 64})
    net = load(description_of(folder, rope_parameters=rope | {key: value}), max_model_len=128)
    moved = relative_error(prompt_logits(net, prompts())[0], expected[0])
    assert moved > 100 * TOLERANCE, moved


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_mutated_gemma_rope_moves_logits(folders: Any, kind: str) -> None:
    folder, expected = folders("gemma3", {"rope_parameters": GEMMA_ROPE})
    changed = GEMMA_ROPE | {kind: GEMMA_ROPE[kind] | {"rope_theta": 5e4}}
    net = load(description_of(folder, rope_parameters=changed), max_model_len=128)
    moved = relative_error(prompt_logits(net, prompts())[0], expected[0])
    assert moved > 100 * TOLERANCE, moved


def test_all_registered_families_are_here() -> None:
    assert len(MODELS) == len(FAMILIES)
