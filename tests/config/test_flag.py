# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest

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
    with pytest.raises(ConfigError, match="--max-num-seqs must be at least 1, got 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(ConfigError, match="--scheduling-policy must be one of fcfs, priority"):
        SchedulerConfig(scheduling_policy="lifo")
    with pytest.raises(ConfigError, match="--port must be a port from 0 to 65535, got 70000"):
        ServerConfig(port=70000)
