# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""TritonPagedAttention against float64: in the interpreter, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from llmserve.attention.triton_paged import TritonPagedAttention
from tests.helpers.paged import CASES, make_case, run_interpreted


def test_interpreted() -> None:
    run_interpreted(str(Path(__file__).with_name("interpreted_triton_paged.py")))


def test_capabilities_without_interpreter() -> None:
    assert 0 not in TritonPagedAttention.capabilities.families
    assert torch.bfloat16 in TritonPagedAttention.capabilities.dtypes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gpu_equals_float64(name: str, counted: bool, dtype: torch.dtype) -> None:
    case = make_case(**CASES[name], dtype=dtype, device="cuda")
    if counted:
        case.count_on_device()
    backend = TritonPagedAttention(case.shape, dtype, torch.device("cuda"))
    backend.plan(case.metadata)
    for scratch in (backend.scratch, backend.tile_scratch):
        scratch.partial.fill_(torch.nan)
    for _ in range(2):  # the counters are as they were
        out = backend.forward(case.query, case.kv_cache, case.metadata)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), case.expected(), atol=tolerance, rtol=tolerance)
