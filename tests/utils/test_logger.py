# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import logging
import os
import subprocess
import sys

import pytest

from llmserve import envs
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


def test_nothing_that_is_logged_ends_a_line_or_speaks_to_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = logging.getLogger("llmserve")
    before = own.handlers[:], own.level, own.propagate
    try:
        configure("Tester")
        get_logger("llmserve.x").warning("a%sb", "\r\nforged\x1b[31m\u2028 é")
        (line,) = capsys.readouterr().err.splitlines()
    finally:
        own.handlers[:], own.level, own.propagate = before
    assert line.endswith(r"a\r\nforged\x1b[31m\u2028 éb")


_CHILD = """
import logging, sys
from llmserve import envs
from llmserve.utils.logger import configure, get_logger
configure("Child")
get_logger("llmserve.x").info("one\\n%s", "\\x1b two")
logging.getLogger("asyncio").error("three")
try:
    1 / 0
except ZeroDivisionError:
    get_logger("llmserve.x").exception("four")
raise RuntimeError("five")
"""


def test_json_lines_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_LOG_FORMAT", "text")  # put back at the end
    envs.set_log_format("json")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        env=envs.child_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    lines = [json.loads(line) for line in child.stderr.splitlines()]
    assert [line["message"] for line in lines] == ["one\n\x1b two", "three", "four", "uncaught"]
    assert "ZeroDivisionError" in lines[2]["exception"] and "five" in lines[3]["exception"]
    assert {line["process"] for line in lines} == {"Child"}
    assert [line["level"] for line in lines] == ["INFO", "ERROR", "ERROR", "CRITICAL"]


def test_a_deep_traceback_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(depth: int) -> None:
        if not depth:
            raise KeyError("the innermost")
        also_fail(depth)

    def also_fail(depth: int) -> None:
        fail(depth - 1)

    own = logging.getLogger("llmserve")
    before = own.handlers[:], own.level, own.propagate
    try:
        configure("Tester")
        try:
            fail(60)
        except KeyError:
            get_logger("llmserve.x").exception("failed")
        lines = capsys.readouterr().err.splitlines()
    finally:
        own.handlers[:], own.level, own.propagate = before
    assert len(lines) == 19 and lines[0].endswith("failed") and lines[2] == "  ..."
    assert lines[-1] == "KeyError: 'the innermost'" and "raise KeyError" in lines[-2]
