# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os

import torch

from llmserve.worker.device import detect


def test_the_cpu_is_described() -> None:
    info = detect("cpu")
    assert (info.kind, info.family) == ("cpu", 0)
    assert 1 <= info.cores <= len(os.sched_getaffinity(0))
    assert info.memory_bytes > 1 << 28
    if torch.cpu._is_amx_tile_supported():
        assert info.fast_bfloat16
