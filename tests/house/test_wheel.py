# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is installed has no way to run code that comes as data."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house import rules
from tests.house.rules import ROOT, Source

# Names that no file of the wheel may have outside comments and strings, and where they may be.
BANNED = re.compile(
    r"\b(pickle|cPickle|cloudpickle|dill|marshal|shelve|joblib|recv_pyobj|send_pyobj|"
    r"(?:all_gather|broadcast|gather|scatter|send|recv)_object(?:_list)?|"
    r"torch\.load|torch\.save|np\.load|numpy\.load|allow_pickle|"
    r"yaml\.load|importlib\.util|runpy|SourceFileLoader|get_class_from_dynamic_module|"
    r"os\.system|shell=True)\b|(?<![\w.])(?<!def )(eval|exec|compile|__import__)\("
)
ALLOWED_CODE_BY_NAME = {"utils/registry.py"}  # names of our own modules


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "src", "csrc", "pyproject.toml",
         "setup.py", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "-w", str(folder), str(copy)],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def code_of(text: str) -> str:
    """The text without comments and strings."""
    text = re.sub(r'("""|\'\'\')[\s\S]*?\1', '""', text)
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', '""', text)
    return re.sub(r"#.*", "", text)


def violations(name: str, text: str) -> list[str]:
    found = [match.group() for match in BANNED.finditer(code_of(text))]
    source = Source(name.removeprefix("llmserve/"), text)
    for rule in (rules.no_code_from_data, rules.imports_at_top):
        found += [what for _, what in rule(source)]
    return found


def test_the_wheel_calls_nothing_that_runs_data(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if name.endswith(".py")]
    assert {"llmserve/api/app.py", "llmserve/engine/process.py"} <= set(names) and len(names) > 150
    wrong = {
        name: found for name in names if (found := violations(name, wheel.read(name).decode()))
    }
    assert not wrong


def test_the_wheel_has_code_alone(wheel: zipfile.ZipFile) -> None:
    assert {"cpu_decode.cpp", "cpu_tiles.h"} <= {Path(name).name for name in wheel.namelist()}
    kinds = {Path(name).suffix for name in wheel.namelist() if ".dist-info/" not in name}
    assert not kinds & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".pyc", ".npy"}


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "x = socket.recv_pyobj()",
        "torch.load(path)",
        "dist.broadcast_object_list([x])",
        "eval(text)",
        "exec(text)",
        "np.load(path, allow_pickle=True)",
        "importlib.util.spec_from_file_location(a, b)",
        "__import__(name)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_planted_calls_are_found(planted: str) -> None:
    assert violations("llmserve/x.py", planted + "\n")
    assert not violations("llmserve/x.py", f"# {planted}\n") or "trust" in planted
