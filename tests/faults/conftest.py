# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The shared bench."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.faults import Bench, write_bench_model


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; its logits are wider than its tokenizer."""
    return write_bench_model(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def bench(bench_model: Path) -> Iterator[Bench]:
    """One server for all rows that leave it running."""
    sys.setswitchinterval(5e-4)  # what reads streams and probes has its clock in this process
    with Bench(bench_model) as started:
        yield started
