# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Compiles csrc/cpu_decode.cpp with the machine's own compiler, for the very processor there is."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from llmserve import envs
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "cpu_decode.cpp"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-fPIC", "-shared", "-w",
)  # fmt: skip
_TIMEOUT = 120  # seconds; it takes 3


def build(folder: Path) -> Path:
    """The library's path in `folder`, which is made for this user alone. Built once for each
    source, compiler and processor; processes that start together may each build it, and the last
    one's file stays. OSError or SubprocessError say why it cannot be built.
    """
    compiler = find_compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT
    ).stdout
    key = hashlib.sha256()
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("cpu_*"))]
    for part in (*sources, repr((compiler, _FLAGS)).encode(), version, _processor()):
        key.update(hashlib.sha256(part).digest())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others")
    path = folder / f"{SOURCE.stem}-{key.hexdigest()[:20]}.so"
    if path.exists():
        return path
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as made:
        target = Path(made) / path.name
        done = subprocess.run(
            [*compiler, *_FLAGS, "-o", str(target), str(SOURCE)],
            capture_output=True, text=True, timeout=_TIMEOUT,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"{compiler[0]} ended with {done.returncode} ({last})")
        target.replace(path)
    logger.info("compiled CPU kernels in %.1f s", time.perf_counter() - began)
    return path


def find_compiler() -> list[str]:
    """The command of `CXX`, or of the first known compiler there is."""
    wanted = shlex.split(envs.CXX)
    for name in [wanted[0]] if wanted else _COMPILERS:
        if (found := shutil.which(name)) is not None:
            return [found, *wanted[1:]]
    names = f"CXX={envs.CXX}" if wanted else ", ".join(_COMPILERS)
    raise FileNotFoundError(f"no C++ compiler ({names})")


def _processor() -> bytes:
    """What -march=native depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = ("flags", "Features", "model", "cpu family", "CPU part")
    chosen = sorted({line for line in lines if line.split(":")[0].strip() in kinds})
    return "\n".join([platform.machine(), *chosen]).encode()
