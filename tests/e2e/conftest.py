# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Models that whole servers are started on. Their embeddings are not tied: where they are, a random
model says its last token again and again, whatever it is asked."""

from pathlib import Path

import pytest

from tests.helpers.tiny_models import write_tiny_gguf, write_tiny_model

LONG = 32768  # tokens of context: a stream that is still running when the test looks


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded folder."""
    folder = tmp_path_factory.mktemp("qwen3")
    config = {"max_position_embeddings": LONG, "tie_word_embeddings": False}
    write_tiny_model(folder, "qwen3", sharded=True, **config)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file."""
    path = tmp_path_factory.mktemp("gemma3") / "tiny.gguf"
    return write_tiny_gguf(path, "gemma3", tie_word_embeddings=False)
