# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The environment variables that precede configuration. The only reader of `os.environ`."""

import os
import site
from pathlib import Path


def _user_cache() -> Path:
    """`~/.cache`; a user without an entry and HOME, as containers may have, gets one in TMPDIR."""
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(os.environ.get("TMPDIR") or "/tmp") / f"cache-{os.getuid()}"


LOG_LEVEL: str = os.environ.get("LLMSERVE_LOG_LEVEL", "INFO").upper()
CACHE_DIR: Path = Path(os.environ.get("LLMSERVE_CACHE_DIR") or _user_cache() / "llmserve")
API_KEY: str | None = os.environ.get("LLMSERVE_API_KEY") or os.environ.get("VLLM_API_KEY") or None
RUNTIME_DIR: Path = Path(os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp")
CXX: str = os.environ.get("CXX", "")
TRITON_INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0") == "1"


_PRIMITIVE_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def log_format() -> str:
    """Of this process's log lines: "text", or what `set_log_format` of it or its parent said."""
    return os.environ.get("LLMSERVE_LOG_FORMAT", "text")


def set_log_format(value: str) -> None:
    """For this process and all that it starts."""
    os.environ["LLMSERVE_LOG_FORMAT"] = value


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment for a child, with `overrides` on top.

    Threads of a CPU engine spin only briefly while they wait, unless the user says otherwise. With
    libgomp's 300,000 rounds they take the cores from those they wait for (1.4 tok/s beside a busy
    process instead of 9); asleep at once, they lose nearly half the speed of an idle machine.

    The CPU library keeps what it prepared for each number of rows, up to 1,024 of them in each of
    two caches, half a megabyte each for a model of two tiny layers; 128 are enough to decode.
    """
    own = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "20000"}
    own |= dict.fromkeys(_PRIMITIVE_CACHES, "128")
    return own | dict(os.environ) | overrides


def empty_home(folder: str) -> dict[str, str]:
    """Overrides for a child that finds none of the user's caches of compiled code: its home is
    `folder`. Packages and models stay where they are: to fetch them again would measure the net.
    """
    return {
        "HOME": folder,
        "XDG_CACHE_HOME": f"{folder}/.cache",
        "TRITON_CACHE_DIR": f"{folder}/.triton",
        "CUDA_CACHE_PATH": f"{folder}/.nv",
        "FLASHINFER_WORKSPACE_BASE": folder,
        "LLMSERVE_CACHE_DIR": str(CACHE_DIR),
        "HF_HOME": os.environ.get("HF_HOME") or str(_user_cache() / "huggingface"),
        "PYTHONUSERBASE": site.getuserbase(),
    }
