# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import ctypes
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmserve import envs
from llmserve.kernels import cpu_build
from llmserve.kernels.cpu_build import build, find_compiler
from tests.helpers.compiler import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpu_number.cpp"
    path.write_text('extern "C" int number() { return 7; }')
    monkeypatch.setattr(cpu_build, "SOURCE", path)
    monkeypatch.setattr(envs, "CXX", "")
    return path


def test_builds_once_for_each_source(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "made"
    with ThreadPoolExecutor(3) as pool:  # as processes that start together
        (path,) = set(pool.map(build, [folder] * 3))
    assert ctypes.CDLL(str(path)).number() == 7
    assert list(folder.iterdir()) == [path]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    built = path.stat().st_mtime_ns
    assert build(folder) == path and path.stat().st_mtime_ns == built
    source.write_text('extern "C" int number() { return 8; }')
    assert ctypes.CDLL(str(build(folder))).number() == 8


def test_a_folder_that_others_can_write_is_not_loaded_from(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    os.chmod(folder, 0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        build(folder)


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    source.write_text("this is not C++")
    with pytest.raises(OSError, match="ended with"):
        build(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_the_compiler_is_cxx_or_the_first_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("g++", "clang++"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(envs, "CXX", "")
    assert find_compiler() == [str(tmp_path / "g++")]
    monkeypatch.setattr(envs, "CXX", "clang++ -m64")
    assert find_compiler() == [str(tmp_path / "clang++"), "-m64"]
    monkeypatch.setattr(envs, "CXX", "none")
    with pytest.raises(FileNotFoundError, match="no C\\+\\+ compiler \\(CXX=none\\)"):
        find_compiler()
    monkeypatch.setattr(envs, "CXX", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="c\\+\\+, g\\+\\+, clang\\+\\+"):
        find_compiler()
