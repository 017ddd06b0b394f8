# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest

from llmserve.config.rope import context_length, normalize
from llmserve.errors import ConfigError


def test_both_forms_give_one() -> None:
    old = {
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    new = {
        "max_position_embeddings": 131072,
        "rope_parameters": old["rope_scaling"] | {"rope_theta": 5e5},
    }
    assert normalize(old) == normalize(new) == new["rope_parameters"]


def test_type_is_the_old_name_of_rope_type_and_su_of_longrope() -> None:
    lists = {"short_factor": [1.0], "long_factor": [2.0]}
    rope = normalize(
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "su", **lists},
        }
    )
    assert rope == {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 4096,
        **lists,
    }


def test_an_override_in_the_old_form_keeps_the_theta_of_the_new() -> None:
    config = {
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    assert normalize(config) == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }


def test_gemma_has_one_a_layer_type() -> None:
    old = {
        "model_type": "gemma3_text",
        "rope_theta": 2e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    expected = {
        "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    assert normalize(old) == expected
    assert normalize({"model_type": "gemma3_text", "rope_parameters": expected}) == expected
    bare = normalize({"model_type": "gemma3_text"})
    assert [rope["rope_theta"] for rope in bare.values()] == [1e6, 1e4]


@pytest.mark.parametrize(
    ("scaling", "complaint"),
    [
        ({"rope_type": "mrope"}, "'mrope' is not supported"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "needs long_factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("yarn", "must be objects"),
    ],
)
def test_refused(scaling: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        normalize({"max_position_embeddings": 64, "rope_scaling": scaling})


TRAINED = {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default"}, 32768),
        ({"rope_type": "linear", "factor": 2.0}, 65536),
        ({"rope_type": "dynamic", "factor": 2.5}, 81920),
        ({"rope_type": "yarn", "factor": 4.0} | TRAINED, 32768),
        ({"rope_type": "llama3", "factor": 8.0} | TRAINED, 32768),
        ({"rope_type": "longrope"} | TRAINED, 32768),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 32768),
    ],
)
def test_context_length(rope: dict[str, Any], tokens: int) -> None:
    assert context_length({"max_position_embeddings": 32768, "rope_parameters": rope}) == tokens


@pytest.mark.parametrize("value", [None, 0, "many"])
def test_context_length_must_be_a_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings must be a count"):
        context_length({"max_position_embeddings": value, "rope_parameters": {}})


def test_published_gemma_configs_name_no_length() -> None:
    config = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {}}}
    assert context_length(config) == 131072
