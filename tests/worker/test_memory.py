# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Memory limits, read from folders that look like the kernel's."""

import os
from pathlib import Path

import pytest

from llmserve.worker.memory import free_memory, total_memory

GIB = 1 << 30
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1_UNLIMITED = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> None:
    files = {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {8 << 20} kB\n"} | files
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def v2(place: str, limit: object, used: int, droppable: int = 0) -> dict[str, object]:
    at = f"sys/fs/cgroup/{place}"
    return {
        f"{at}memory.max": limit,
        f"{at}memory.current": used,
        f"{at}memory.stat": f"anon 1\ninactive_file {droppable}",
    }


def v1(place: str, limit: int, used: int) -> dict[str, object]:
    at = f"sys/fs/cgroup/memory/{place}"
    return {
        f"{at}memory.limit_in_bytes": limit,
        f"{at}memory.usage_in_bytes": used,
        f"{at}memory.stat": "inactive_file 5\ntotal_inactive_file 0",
    }


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, PHYSICAL, 8 * GIB),
        ({"proc/self/cgroup": "0::/", **v2("", "max", 3)}, PHYSICAL, 8 * GIB),
        # its own cgroup; page cache does not count
        ({"proc/self/cgroup": "0::/a/b", **v2("a/b/", GIB, 700, 200)}, GIB, GIB - 500),
        # the one around it is tighter
        (
            {"proc/self/cgroup": "0::/a/b", **v2("a/b/", "max", 9), **v2("a/", GIB, 9)},
            GIB,
            GIB - 9,
        ),
        # a container that sees its own cgroup as the top
        ({"proc/self/cgroup": "0::/docker/ab", **v2("", GIB, 9)}, GIB, GIB - 9),
        ({"proc/self/cgroup": "3:cpu:/a\n4:cpuset,memory:/a", **v1("a/", GIB, 9)}, GIB, GIB - 9),
        ({"proc/self/cgroup": "4:memory:/", **v1("", V1_UNLIMITED, 9)}, PHYSICAL, 8 * GIB),
        # another controller's path
        ({"proc/self/cgroup": "3:cpu:/a\n4:memory:/b", **v1("a/", GIB, 9)}, PHYSICAL, 8 * GIB),
        ({"proc/self/cgroup": "0::/", **v2("", GIB, 2 * GIB)}, GIB, 0),
    ],
)
def test_limits(tmp_path: Path, files: dict[str, object], total: int, free: int) -> None:
    write(tmp_path, files)
    assert total_memory(tmp_path) == total
    assert free_memory(tmp_path) == free


def test_this_machine() -> None:
    assert 0 < free_memory() <= total_memory() <= PHYSICAL
