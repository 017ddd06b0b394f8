# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One server with a tiny random model, for all clients. It is left idle by each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.server import Server
from tests.helpers.tiny_models import write_tiny_model

CONTEXT = 256


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, "qwen3", tie_word_embeddings=False)


def _serve(model: Path, *more: str) -> Iterator[Server]:
    flags = ["--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "16MiB"]
    flags += ["--dtype", "float32", "--cpu-threads", "1", "--disable-uvicorn-access-log"]
    with Server(str(model), *flags, "--served-model-name", "tiny", *more) as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def running(weights: Path) -> Iterator[Server]:
    yield from _serve(weights)


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.check_idle()


@pytest.fixture(scope="session")
def thinker(weights: Path) -> Iterator[Server]:
    """A server that takes its model for one that thinks, and calls as Gemma does."""
    flags = ["--reasoning-parser", "think", "--tool-call-parser", "gemma4"]
    yield from _serve(weights, *flags, "--trust-request-chat-template")
