# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import dataclasses

import msgspec
import pytest

from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.errors import ConfigError


def test_flags_land_in_their_groups() -> None:
    config = EngineConfig.from_flags(model="m", max_num_seqs=3, block_size=32, device="cpu")
    assert (config.model.model, config.scheduler.max_num_seqs) == ("m", 3)
    assert (config.cache.block_size, config.device.device) == (32, "cpu")
    assert EngineConfig.from_flags() == EngineConfig()


def test_no_two_groups_share_a_flag() -> None:
    names = [field.name for group in ENGINE_GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_unknown_option_and_bad_value_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown option --block-sise; did you mean --block-size"):
        EngineConfig.from_flags(block_sise=16)
    with pytest.raises(ConfigError, match="--block-size must be 8, 16, 32, 64 or 128, got 17"):
        EngineConfig.from_flags(block_size=17)


def test_config_crosses_a_process_edge_unchanged() -> None:
    config = EngineConfig.from_flags(
        model="m", hf_overrides={"a": [1, {"b": None}]}, max_model_len=-1
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config
