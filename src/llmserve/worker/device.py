# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the machine offers."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.errors import ConfigError
from llmserve.kernels.triton_jit import Card, card_of
from llmserve.worker.memory import total_memory


@dataclass(frozen=True)
class DeviceInfo:
    """One device. `family` is the compute capability's major number, 0 for a CPU."""

    kind: str  # "cuda" | "cpu"
    name: str
    family: int
    memory_bytes: int
    fast_bfloat16: bool
    cores: int  # physical ones that this process may use; CPU only


def detect(requested: str) -> DeviceInfo:
    """The device for `--device`: "auto" is CUDA where a card answers."""
    usable = requested != "cpu" and torch.cuda.is_available()
    if requested == "cuda" and not usable:
        raise ConfigError("--device cuda: no CUDA device can be used")
    if usable:
        properties = torch.cuda.get_device_properties(0)
        return DeviceInfo(
            "cuda", properties.name, properties.major, properties.total_memory, True, 0
        )
    flags, name, cores = _read_cpuinfo()
    fast = not flags.isdisjoint({"avx512_bf16", "amx_bf16"})
    return DeviceInfo("cpu", name, 0, total_memory(), fast, cores)


def present_card() -> Card | None:
    """The GPU that `detect` finds, if any."""
    return card_of(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def _read_cpuinfo() -> tuple[set[str], str, int]:
    allowed = os.sched_getaffinity(0)
    path = Path("/proc/cpuinfo")
    flags: set[str] = set()
    name = "CPU"
    cores: set[tuple[str, str]] = set()
    for block in path.read_text().split("\n\n") if path.exists() else []:
        entry = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in block.splitlines())
        }
        flags |= set(entry.get("flags", "").split())
        name = entry.get("model name", name)
        if int(entry.get("processor", -1)) in allowed:
            cores.add(
                (entry.get("physical id", "0"), entry.get("core id", entry.get("processor", "")))
            )
    return flags, name, len(cores) or len(allowed)
