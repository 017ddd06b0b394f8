# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of the host's memory this process may have: the machine's, within its cgroups' limits.

Files and their meaning: Linux's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# Folder of the memory controller, and its limit, usage and droppable page cache, by version.
_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
       "total_inactive_file")  # fmt: skip


def total_memory(root: Path = _ROOT) -> int:
    """Bytes of the machine, or of the tightest cgroup. `root` is the file system to read."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _cgroups(root))])


def free_memory(root: Path = _ROOT) -> int:
    """Bytes that this process could be given without swapping. `root` as above."""
    system = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for name, value in _pairs(root / "proc/meminfo"):
        if name == "MemAvailable:":
            system = value * 1024
    return max(min([system, *(limit - used for limit, used in _cgroups(root))]), 0)


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of this process's cgroup and of those around it, where there is one.

    A container often sees its own cgroup as the top, whatever path the kernel tells it.
    """
    own = root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, usage, cache = _V1 if controllers else _V2
        top = root / folder
        inside = Path(path.lstrip("/"))
        for place in (top / inside, *(top / parent for parent in inside.parents)):
            most = _read(place / limit)
            if most.isdecimal():  # without a limit it is "max"
                droppable = dict(_pairs(place / "memory.stat")).get(cache, 0)
                yield int(most), int(_read(place / usage) or 0) - droppable


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in _read(path).splitlines():
        name, value, *_ = line.split()
        yield name, int(value)
