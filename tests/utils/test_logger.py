# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import logging
import os

import pytest

from llmserve.utils.logger import configure, get_logger


def test_lines_say_process_file_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    own = logging.getLogger("llmserve")
    before = own.handlers[:], own.level, own.propagate
    try:
        configure("Tester")
        configure("Tester")  # twice is once
        get_logger("llmserve.some.module").info("hello %d", 7)
        get_logger("other").info("not ours")
        lines = capsys.readouterr().err.splitlines()
    finally:
        own.handlers[:], own.level, own.propagate = before
    assert len(lines) == 1
    assert lines[0].startswith(f"(Tester pid={os.getpid()}) INFO ")
    assert lines[0].endswith("] hello 7") and "[test_logger.py:" in lines[0]
