# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log lines as `(EngineCore pid=12) INFO 11-24 07:12:00 [file.py:123] text`, or each as JSON.

Nothing that a client sent may end a line or speak to a terminal: control characters are escaped.
A traceback has its innermost frames alone, so that failing requests do not fill a disk.
"""

import json
import logging
import os
import re
import sys
from types import TracebackType
from typing import Any

from llmserve import envs
from llmserve.errors import ConfigError

_FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_MARKS = re.compile(r"[ ^~]+")  # under the failing part of a line
_MOST_LINES = 18  # of a traceback
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FOREIGN = ("asyncio", "py.warnings")  # libraries that log what we would want to see


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        text = super().formatException(ei)
        lines = [line for line in text.splitlines() if not _MARKS.fullmatch(line)]
        if len(lines) > _MOST_LINES:
            lines[1 : 2 - _MOST_LINES] = ["  ..."]
        return "\n".join(lines)


class _TextFormatter(_Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(_escape, super().formatMessage(record))


class _JsonFormatter(_Formatter):
    """One object a line: time (UTC), level, process, pid, file, line, message, exception."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}",
            "level": record.levelname,
            "process": self._process_name,
            "pid": os.getpid(),
            "file": record.filename,
            "line": record.lineno,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure(process_name: str) -> None:
    """Sets up logging for this process; called once by each process's entry point."""
    if envs.LOG_LEVEL not in _LEVELS:
        raise ConfigError(
            f"LLMSERVE_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {envs.LOG_LEVEL!r}"
        )
    handler = logging.StreamHandler(sys.stderr)
    if envs.log_format() == "json":
        handler.setFormatter(_JsonFormatter(process_name))
        sys.excepthook = _log_uncaught
    else:
        handler.setFormatter(
            _TextFormatter(f"({process_name} pid={os.getpid()}) {_FORMAT}", "%m-%d %H:%M:%S")
        )
    root = logging.getLogger("llmserve")
    root.handlers[:] = [handler]
    root.setLevel(envs.LOG_LEVEL)
    root.propagate = False
    logging.captureWarnings(True)
    for name in _FOREIGN:
        logging.getLogger(name).handlers[:] = [handler]


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger("llmserve").critical("uncaught", exc_info=(kind, error, trace))


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is its `__name__`."""
    return logging.getLogger(name)
