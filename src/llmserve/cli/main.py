# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The program `llmserve`: finds the subcommand and turns its errors into one line."""

import argparse
import contextlib
import difflib
import io
import os
import signal
import sys
import traceback
from types import FrameType

from llmserve import __version__
from llmserve.errors import ConfigError, LLMServeError
from llmserve.utils.address_space import check_address_space
from llmserve.utils.registry import Registry

COMMANDS = Registry(
    "command",
    {
        "serve": "llmserve.cli.serve:run",
        "chat": "llmserve.cli.chat:run",
        "complete": "llmserve.cli.complete:run",
        "bench latency": "llmserve.cli.bench.latency:run",
        "bench throughput": "llmserve.cli.bench.throughput:run",
        "bench serve": "llmserve.cli.bench.serve:run",
        "bench startup": "llmserve.cli.bench.startup:run",
        "plan": "llmserve.cli.plan:run",
        "warmup": "llmserve.cli.warmup:run",
        "tune-kernels": "llmserve.cli.tune_kernels:run",
        "collect-env": "llmserve.cli.collect_env:run",
    },
)
_WITHOUT_ENGINE = ("chat", "complete", "bench serve", "collect-env")
_HELP = {
    "serve": "serve a model over the OpenAI API",
    "chat": "talk to a running server",
    "complete": "let a running server continue a text",
    "bench": "measure: latency, throughput, serve, startup",
    "plan": "what a model needs, and what fits, before anything is loaded",
    "warmup": "compile a model's kernels before it is started",
    "tune-kernels": "measure the tiles of a model's linear layers on this card",
    "collect-env": "what to send along with a bug report",
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _HELP))
    lines = "\n".join(f"  {name:{width}}  {text}" for name, text in _HELP.items())
    parser = argparse.ArgumentParser(
        prog="llmserve",
        usage="llmserve COMMAND [options]",
        description=f"commands:\n{lines}",
        epilog="llmserve COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--version", action="version", version=__version__)
    return parser


def _find(argv: list[str]) -> tuple[str, list[str]]:
    name, rest = argv[0], argv[1:]
    if name == "bench":
        kinds = [command.split()[1] for command in COMMANDS if command.startswith("bench ")]
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: llmserve bench {{{','.join(kinds)}}} [options]")
            raise SystemExit(0 if rest else 2)
        name, rest = f"bench {rest[0]}", rest[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (there are: {', '.join(_HELP)})"
        raise ConfigError(f"unknown command {name!r}{hint}")
    return name, rest


def _open_streams() -> None:
    """Streams that the shell closed go nowhere, those of children too; characters that the
    terminal's encoding lacks are printed as escapes, and bytes that it lacks are read as they are.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != fd:  # which it is where no other closed stream comes first
                os.dup2(nowhere, fd)
                os.close(nowhere)
            os.set_inheritable(fd, True)
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if fd else "surrogateescape")


def _end_by_signals() -> None:
    """From now on they unwind: a command may have an engine to end."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Exit codes: its own, 1 failed, 2 refused, 130 and 143 by signals."""
    argv = sys.argv[1:] if argv is None else argv
    _open_streams()
    if not argv or argv[0].startswith("-"):
        _parser().parse_args(argv[:1] or ["--help"])
    try:
        try:
            name, rest = _find(argv)
            if name not in _WITHOUT_ENGINE:
                check_address_space()
            command = COMMANDS.load(name)
            if name != "serve":
                _end_by_signals()
            code: int = command(rest)
            return code
        finally:
            sys.stdout.flush()
    except LLMServeError as error:
        sys.stderr.write(f"llmserve: error: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output left; say nothing at exit either
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:  # a file that cannot be written, a full disk
        what = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"llmserve: error: {what}{error.strerror or error}\n")
        with contextlib.suppress(OSError):  # what is left to print must not fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:  # boundary: whatever it was, the last line says it
        traceback.print_exc()
        sys.stderr.write(f"llmserve: error: {type(error).__name__}: {error}\n")
        return 1
