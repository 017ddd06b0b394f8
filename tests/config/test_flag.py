# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest

from llmserve.config.engine import EngineConfig
from llmserve.config.flag import size
from llmserve.config.scheduler import SchedulerConfig
from llmserve.config.server import ServerConfig
from llmserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("16k", 16_000),
        ("16K", 16_384),
        ("1.5m", 1_500_000),
        ("2M", 2 << 20),
        ("70GiB", 70 << 30),
        ("70gib", 70 << 30),
        ("1GB", 10**9),
        ("0.5GiB", 1 << 29),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "k", "12q", "1e3", "--5", "12 k", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        size(text)


def test_checks_name_flag_and_value() -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs must be from 1 to 65536, got 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="--scheduling-policy must be one of fcfs, priority"):
        SchedulerConfig(scheduling_policy="lifo")
    with pytest.raises(ConfigError, match="--port must be a port from 0 to 65535, got 70000"):
        ServerConfig(port=70000)


@pytest.mark.parametrize(
    ("name", "value"), [("host", ""), ("uds", ""), ("api_key", ["k", ""]), ("api_key", [""])]
)
def test_a_text_that_is_empty_is_no_default(name: str, value: Any) -> None:
    """`--api-key "$KEY"` without KEY served everybody, and an empty host is every interface."""
    flag = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{flag} must not be empty, got "):
        ServerConfig(**{name: value})
    assert ServerConfig(root_path="").root_path == EngineConfig.from_flags(model="").model.model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_seqs": "abc"}, "--max-num-seqs must be a whole number of 64 bits, got 'abc'"),
        ({"max_num_seqs": True}, "--max-num-seqs must be a whole number"),
        ({"max_model_len": "4k"}, "--max-model-len must be a whole number"),
        ({"gpu_memory_utilization": "0.5"}, "--gpu-memory-utilization must be a number"),
        ({"seed": 10**30}, "--seed must be a whole number of 64 bits, got 1000"),
        ({"seed": None}, "--seed must be a whole number"),
        ({"enforce_eager": "yes"}, "--enforce-eager must be true or false, got 'yes'"),
        ({"model": None}, "--model must be text, got None"),
        ({"tokenizer": 5}, "--tokenizer must be text, got 5"),
        ({"served_model_name": "a"}, "--served-model-name must be a list of which each is text"),
        ({"served_model_name": [1]}, "--served-model-name must be a list of which each is text"),
        ({"hf_overrides": [1]}, "--hf-overrides must be a JSON object, got "),
        ({"structured_outputs_config": "x"}, "--structured-outputs-config must be a JSON object"),
        ({"override_generation_config": {"temprature": 1}}, "--override-generation-config knows"),
        ({"override_generation_config": {"top_k": "x"}}, "top_k must be a number"),
        ({"cpu_threads": 10**6}, "--cpu-threads must be from 1 to 1024"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_of_another_type_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_flags(**flags)
    assert message in caught.value.message
    assert EngineConfig.from_flags(gpu_memory_utilization=1, seed=-5).cache.gpu_memory is None
