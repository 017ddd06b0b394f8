# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""FlashInferAttention against float64, where FlashInfer's modules are built."""

from pathlib import Path

import pytest
import torch

from llmserve.attention import flashinfer as module
from llmserve.attention.base import AttentionShape
from llmserve.attention.flashinfer import FlashInferAttention
from llmserve.attention.registry import choose
from tests.helpers.paged import make_case, run_interpreted


def test_not_chosen_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flashinfer", None)
    shape = AttentionShape(4, 2, 128, 0.1)
    reason = FlashInferAttention.missing(shape, torch.bfloat16, 9)
    assert reason == "flashinfer-python installed"
    assert choose(shape, torch.bfloat16, 9, None) is not FlashInferAttention


def test_interpreted() -> None:
    run_interpreted(str(Path(__file__).with_name("interpreted_flashinfer.py")))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "far"), [(64, False), (128, False), (256, False), (128, True)]
)
def test_gpu_equals_float64(head_dim: int, far: bool) -> None:
    """Several prompts, long and short, beside decode rows and cached tokens."""
    shape = AttentionShape(4, 2, head_dim, head_dim**-0.5)
    family = torch.cuda.get_device_capability()[0]
    assert choose(shape, torch.bfloat16, family, None) is FlashInferAttention
    case = make_case(
        [(1, 9), (1, 77), (5, 300), (130, 130), (64, 2000)], heads=4, kv_heads=2,
        head_dim=head_dim, dtype=torch.bfloat16, device="cuda", far=far,
    )  # fmt: skip
    backend = FlashInferAttention(case.shape, torch.bfloat16, torch.device("cuda"))
    for _ in range(4):  # each plan has a buffer of its own
        backend.plan(case.metadata)
        backend.scratch.partial.fill_(torch.nan)
        out = backend.forward(case.query, case.kv_cache, case.metadata)
        torch.testing.assert_close(out.double(), case.expected(), atol=2e-2, rtol=2e-2)
