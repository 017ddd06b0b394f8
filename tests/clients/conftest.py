# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One server with a tiny random model, for all clients. It is left idle by each test."""

from collections.abc import Iterator

import pytest

from tests.helpers.server import Server
from tests.helpers.tiny_models import write_tiny_model

CONTEXT = 256


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", tie_word_embeddings=False)
    flags = ["--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "16MiB"]
    flags += ["--dtype", "float32", "--cpu-threads", "1", "--disable-uvicorn-access-log"]
    with Server(str(folder), *flags, "--served-model-name", "tiny") as server:
        yield server.wait_ready()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    yield running
    running.check_idle()
