# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""TritonPagedAttention in the interpreter; run by test_triton_paged.py in a child process."""

import pytest
import torch

from llmserve.attention.triton_paged import TritonPagedAttention
from tests.helpers.paged import CASES, make_case


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str, counted: bool) -> None:
    """As a step by itself, and as a graph that is told how many rows there are."""
    case = make_case(**CASES[name])
    if counted:
        case.count_on_device()
    backend = TritonPagedAttention(case.shape, torch.float32, torch.device("cpu"))
    backend.plan(case.metadata)
    for scratch in (backend.scratch, backend.tile_scratch):
        scratch.partial.fill_(torch.nan)
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-5, rtol=1e-4)
    assert not backend.scratch.arrived.any() and not backend.tile_scratch.arrived.any()
    if "split" in name:
        assert not backend.tile_scratch.partial.isnan().all()


def test_padding_row_is_zero() -> None:
    """A row of length 0, as a captured graph has, neither reads the cache nor yields NaN."""
    case = make_case([(1, 20), (1, 40)])
    case.metadata.seq_lens[1] = 0
    backend = TritonPagedAttention(case.shape, torch.float32, torch.device("cpu"))
    backend.plan(case.metadata)
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1].double(), case.expected()[:1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("counted", [False, True])
def test_a_single_prompt_keeps_all_programs_busy(counted: bool, tiles: int) -> None:
    """Its tiles are counted exactly: each that is not there would take its share of the parts. Five
    of them leave three of eight programs idle, and in three parts each one of sixteen."""
    case = make_case([(1, 40), (64 * tiles, 2048)], heads=1, kv_heads=1)
    if counted:
        case.count_on_device()
    backend = TritonPagedAttention(case.shape, torch.float32, torch.device("cpu"))
    backend.plan(case.metadata)
    backend.tile_scratch.partial.fill_(torch.nan)
    programs = backend.tile_scratch.programs
    assert programs == 8
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-5, rtol=1e-4)
    used = ~backend.tile_scratch.partial.isnan().flatten(1).any(1)
    assert int(used.sum()) == {1: programs, 5: 15}[tiles]
