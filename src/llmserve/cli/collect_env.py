# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve collect-env`: the machine and the packages, for a bug report. Imports none of them."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from llmserve import __version__, envs
from llmserve.errors import ConfigError

_PACKAGES = (
    "torch", "triton", "flashinfer-python", "transformers", "tokenizers", "safetensors", "gguf",
    "numpy", "msgspec", "pyzmq", "fastapi", "starlette", "uvicorn", "uvloop", "httptools",
    "pydantic", "huggingface-hub", "jinja2",
)  # fmt: skip
_VARIABLES = re.compile(r"^(LLMSERVE_|VLLM_|CUDA_|NCCL_|HF_|TRANSFORMERS_|TRITON_|OMP_|MKL_)")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _command(*words: str) -> str | None:
    if shutil.which(words[0]) is None:
        return None
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "no answer in 20 s"
    return (run.stdout.strip() or run.stderr.strip()) if run.returncode == 0 else None


def _proc(path: str, key: str) -> str:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "?")


def machine() -> dict[str, str]:
    """System, processor, memory and cards."""
    flags = _proc("/proc/cpuinfo", "flags").split()
    return {
        "system": platform.platform(),
        "python": f"{platform.python_version()} at {sys.executable}",
        "processor": _proc("/proc/cpuinfo", "model name"),
        "processor flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "-",
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": _proc("/proc/meminfo", "MemTotal"),
        "GPU": _command(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap",
            "--format=csv,noheader",
        ) or "none",
        "nvcc": (_command("nvcc", "--version") or "none").splitlines()[-1],
    }  # fmt: skip


def packages() -> dict[str, str]:
    """Installed versions of what matters."""
    versions = {"llmserve": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "-"
    return versions


def variables() -> dict[str, str]:
    """Environment variables that matter; secrets are hidden."""
    return {
        name: "(hidden)" if _SECRET.search(name) else value
        for name, value in sorted(envs.child_environment().items())
        if _VARIABLES.match(name)
    }


def run(argv: list[str]) -> int:
    """Prints the report."""
    if argv in (["-h"], ["--help"]):
        print("usage: llmserve collect-env\n\nPrints what to send along with a bug report.")
        return 0
    if argv:
        raise ConfigError(f"collect-env takes no options, got {argv[0]}")
    for section in (machine(), packages(), variables()):
        for name, value in section.items():
            print(f"{name + ':':20} {value}")
        print()
    return 0
