# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest

from llmserve.models.common import Fields
from llmserve.models.mistral import MistralForCausalLM

GOOD = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("changes", "window"),
    [({"sliding_window": 77}, 77), ({"sliding_window": None}, None), ({}, 4096)],
)
def test_window_absent_null_or_given(changes: dict[str, Any], window: int | None) -> None:
    assert MistralForCausalLM.read(Fields(GOOD | changes)).windows == (window,) * 3
