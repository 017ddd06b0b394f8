# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from pathlib import Path

import pytest

from llmserve.core.kv_spec import FullAttentionSpec, SlidingWindowSpec
from llmserve.errors import ConfigError
from tests.helpers.run_model import description_of, load
from tests.helpers.tiny_models import write_tiny_model


def test_layers_of_both_kinds(tmp_path: Path) -> None:
    net = load(description_of(write_tiny_model(tmp_path, "gemma3")))
    window, full = SlidingWindowSpec(2, 32, 4, 24), FullAttentionSpec(2, 32, 4)
    assert net.kv_specs == [window, window, full, window]
    assert [shape.window for shape in net.attention_shapes] == [24, 24, None, 24]


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gemma3")
    with pytest.raises(ConfigError, match="use_bidirectional_attention is not supported"):
        load(description_of(tmp_path, use_bidirectional_attention=True))
