# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""TorchAttention against float64 attention over unpaged keys."""

import pytest
import torch

from llmserve.attention.torch_sdpa import TorchAttention
from llmserve.kernels import cpu
from tests.helpers.paged import CASES, make_case

torch.set_num_threads(1)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With csrc/cpu_decode.cpp, and as without a compiler."""
    if not request.param:
        monkeypatch.setattr(cpu, "library", lambda: None)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    case = make_case(**CASES[name])
    backend = TorchAttention(case.shape, torch.float32, torch.device("cpu"))
    backend.plan(case.metadata)
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["mixed", "decode_spread", "softcap", "window"])
def test_bfloat16(name: str) -> None:
    case = make_case(**CASES[name], dtype=torch.bfloat16)
    backend = TorchAttention(case.shape, torch.bfloat16, torch.device("cpu"))
    backend.plan(case.metadata)
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    torch.testing.assert_close(out.double(), case.expected(), atol=4e-2, rtol=2e-2)


def test_batches_bound_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of like length share a batch; a short row is not padded to a long one's length."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    case = make_case([(1, 400), (1, 12), (1, 390), (1, 10)])
    backend = TorchAttention(case.shape, torch.float32, torch.device("cpu"))
    backend.plan(case.metadata)
    assert [batch.num_rows for batch in backend.batches] == [2, 2]
    chunks = sum(len(batch.blocks) for batch in backend.batches)
    assert chunks == 2 * 2 * (2 * 25 + 2 * 1)
