# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from llmserve.structured_output.base import GrammarBackend
from llmserve.structured_output.registry import BACKENDS


def test_every_entry_is_a_backend() -> None:
    assert list(BACKENDS) == ["xgrammar", "guidance"]
    assert all(issubclass(BACKENDS.load(name), GrammarBackend) for name in BACKENDS)
