# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log lines as `(EngineCore pid=12) INFO 11-24 07:12:00 [file.py:123] text`."""

import logging
import os
import sys

from llmserve import envs

_FORMAT = "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"


def configure(process_name: str) -> None:
    """Sets up logging for this process; called once by each process's entry point."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"({process_name} pid={os.getpid()}) {_FORMAT}", "%m-%d %H:%M:%S")
    )
    root = logging.getLogger("llmserve")
    root.handlers[:] = [handler]
    root.setLevel(envs.LOG_LEVEL)
    root.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; `name` is its `__name__`."""
    return logging.getLogger(name)
