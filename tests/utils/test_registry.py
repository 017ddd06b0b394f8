# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest

from llmserve.errors import ConfigError
from llmserve.utils.registry import Registry


def test_loads_by_name_and_suggests_the_nearest() -> None:
    registry = Registry("thing", {"queue": "collections:deque", "tree": "no.such.module:Tree"})
    assert registry.load("queue").__name__ == "deque"
    assert list(registry) == ["queue", "tree"]  # listing imports nothing
    with pytest.raises(ConfigError, match="unknown thing 'queu'; did you mean 'queue'"):
        registry.load("queu")
