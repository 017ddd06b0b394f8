# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The program: `python -m llmserve`, and what the installed `llmserve` calls."""

import sys
from _signal import (  # type: ignore[import-not-found]  # built in: there at once
    SIGINT,
    SIGTERM,
    default_int_handler,
    getsignal,
    signal,
)
from os import _exit


def main() -> int:
    """Runs the program; the exit code is as cli/main.py says.

    A signal that comes before there is anything to clean up ends it where it stands: interrupted
    imports end in tracebacks, and those of numpy in errors that are none. Commands are interrupted
    as usual, `serve` takes both signals into its own hands.
    """
    serves = sys.argv[1:2] == ["serve"]

    def leave(signum: int, frame: object) -> None:
        _exit(0 if serves else 128 + signum)

    if getsignal(SIGINT) is default_int_handler:  # else whoever started us has it ignored
        signal(SIGINT, leave)
    if serves:
        signal(SIGTERM, leave)
    from llmserve.cli.main import main as run

    try:
        return run()
    finally:
        if getsignal(SIGINT) is default_int_handler:
            signal(SIGINT, leave)


if __name__ == "__main__":
    raise SystemExit(main())
