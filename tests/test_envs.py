# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve import envs


def _read(name: str, **environment: str) -> str:
    code = f"from llmserve import envs; print(envs.{name})"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(envs.__file__).parents[1]), "HOME": "/home/x"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.strip()


def test_cache_folder_follows_the_environment() -> None:
    assert _read("CACHE_DIR") == "/home/x/.cache/llmserve"
    assert _read("CACHE_DIR", XDG_CACHE_HOME="/c") == "/c/llmserve"
    assert _read("CACHE_DIR", XDG_CACHE_HOME="/c", LLMSERVE_CACHE_DIR="/own") == "/own"


def test_vllms_name_of_the_key_works_too() -> None:
    assert _read("API_KEY") == "None"
    assert _read("API_KEY", VLLM_API_KEY="v") == "v"
    assert _read("API_KEY", VLLM_API_KEY="v", LLMSERVE_API_KEY="o") == "o"


def test_the_cpu_library_keeps_less_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
        assert envs.child_environment()[name] == "128"
        monkeypatch.setenv(name, "9")
        assert envs.child_environment()[name] == "9"


def test_child_environment_is_ours_with_changes_on_top() -> None:
    child = envs.child_environment(LLMSERVE_TEST="1")
    assert child["LLMSERVE_TEST"] == "1"
    assert "PATH" in child


def test_waiting_threads_spin_briefly_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert envs.child_environment()["GOMP_SPINCOUNT"] == "20000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert envs.child_environment()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the count would override it
    assert "GOMP_SPINCOUNT" not in envs.child_environment()


def test_an_empty_home_keeps_models_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    new = envs.empty_home("/empty")
    assert (new["HF_HOME"], new["LLMSERVE_CACHE_DIR"]) == ("/c/huggingface", str(envs.CACHE_DIR))
    code = "import site, pathlib; print(site.getuserbase(), pathlib.Path.home())"
    process = subprocess.run(
        [sys.executable, "-c", code], env=envs.child_environment(**new), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert process.stdout.split() == [new["PYTHONUSERBASE"], "/empty"]
    compiled = (
        "XDG_CACHE_HOME",
        "TRITON_CACHE_DIR",
        "CUDA_CACHE_PATH",
        "FLASHINFER_WORKSPACE_BASE",
    )
    assert all(new[name].startswith("/empty") for name in compiled)
    monkeypatch.setenv("HF_HOME", "/models")
    assert envs.empty_home("/empty")["HF_HOME"] == "/models"


def test_a_user_without_a_home_has_a_cache() -> None:
    code = (
        "import pwd\n"
        "def nobody(uid): raise KeyError\n"
        "pwd.getpwuid = nobody\n"
        "from llmserve import envs; print(envs.CACHE_DIR)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": str(Path(envs.__file__).parents[1])},
    )  # fmt: skip
    assert run.stdout.strip() == f"/tmp/cache-{os.getuid()}/llmserve", run.stderr
