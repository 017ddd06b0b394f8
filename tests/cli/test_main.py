# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llmserve
from llmserve import __version__, envs
from llmserve.cli import main as cli
from llmserve.errors import ConfigError, EngineError
from llmserve.utils.registry import Registry

SRC = Path(llmserve.__file__).parent.parent


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(command.split()[0] in text for command in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["srve"], "unknown command 'srve'; did you mean 'serve'?"),
        (["bench", "serv"], "unknown command 'bench serv'; did you mean 'bench serve'?"),
        (["quux"], "unknown command 'quux' (there are: serve, chat"),
        (["plan", "--prot", "1"], "unknown option --prot"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("llmserve: error: ") and message in err and err.count("\n") == 1


def raiser(error: BaseException) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("no such flag"), 2, "llmserve: error: no such flag\n"),
        (EngineError("it broke"), 1, "llmserve: error: it broke\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(self: Registry, name: str) -> Any:
        return raiser(error)

    monkeypatch.setattr(Registry, "load", load)
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == text


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of the tests are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_ended_cleans_up(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine's folder of sockets stayed where the engine was killed with it."""
    ends: list[str] = []

    def run(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            ends.append("cleaned up")
        return 0

    monkeypatch.setattr(Registry, "load", lambda self, name: run)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else as whoever started the tests has it
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(["plan"]))
    assert (ended.value.code, ends) == (128 + number, ["cleaned up"])


def test_bench_names_its_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "latency,throughput,serve,startup" in capsys.readouterr().out


def test_a_reader_that_leaves_ends_the_program_silently() -> None:
    run = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m llmserve serve --help=all | (exec <&-; sleep 0.3)'],
        capture_output=True, text=True, timeout=60, cwd=SRC,
    )  # fmt: skip
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("redirect", "code", "last"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "llmserve: error: No space left on device"),
        ("--nope 2>&-", 2, ""),
    ],
    ids=["no_stdout", "no_stderr", "full_disk", "error_unseen"],
)
def test_output_that_cannot_be_written(redirect: str, code: int, last: str) -> None:
    command = f"{sys.executable} -m llmserve collect-env {redirect}"
    run = subprocess.run(
        ["sh", "-c", command], env=envs.child_environment(PYTHONPATH=str(SRC)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == code
    assert (run.stderr.splitlines() or [""])[-1] == last and "Traceback" not in run.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_children_have_the_streams_that_the_shell_closed(closed: str) -> None:
    """Else an engine has none to write its stacks to, and ends; or a socket takes the number."""
    child = "import os; [os.fstat(fd) for fd in range(3)]; open(0).read(), os.write(1, b''), "
    child += "os.write(2, b'')"
    code = "import subprocess, sys; from llmserve.cli.main import _open_streams; _open_streams(); "
    code += f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    run = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
        env=envs.child_environment(PYTHONPATH=str(SRC)), stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_an_unknown_log_level_is_one_line() -> None:
    environment = envs.child_environment(PYTHONPATH=str(SRC), LLMSERVE_LOG_LEVEL="foo")
    command = [sys.executable, "-m", "llmserve", "serve", "/nope", "--port", "0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "LLMSERVE_LOG_LEVEL must be one of DEBUG, INFO" in run.stderr


def test_a_terminal_without_the_characters_gets_escapes() -> None:
    code = "from llmserve.cli.main import main; print(main(['nope\\u00e9']), '\\u00e9')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=envs.child_environment(PYTHONPATH=str(SRC), PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert run.stdout == "2 \\xe9\n" and "nope" in run.stderr
