# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Memory that processes share through a file in their private folder."""

import mmap
import os


def shared_page(path: str, num_bytes: int) -> mmap.mmap:
    """The file's first `num_bytes`, zeros at first; whoever comes first makes it (mode 0600).

    A float64 in it is written and read whole.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, num_bytes)
        return mmap.mmap(fd, num_bytes)
    finally:
        os.close(fd)
