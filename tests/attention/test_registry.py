# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Which backend a layer gets, and why not."""

import pytest
import torch

from llmserve.attention.base import AttentionShape
from llmserve.attention.registry import ATTENTION, choose
from llmserve.errors import ConfigError

_SHAPE = AttentionShape(8, 2, 64, 0.125)


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmserve.attention.flashinfer.flashinfer", None)
    assert choose(_SHAPE, torch.bfloat16, 9, None).__name__ == "TritonPagedAttention"
    assert choose(_SHAPE, torch.bfloat16, 0, None).__name__ == "TorchAttention"
    odd = AttentionShape(8, 2, 72, 0.125)
    assert choose(odd, torch.bfloat16, 9, None).__name__ == "TorchAttention"


@pytest.mark.parametrize(
    ("shape", "dtype", "family", "reason"),
    [
        (_SHAPE, torch.float32, 0, "no support for the CPU"),
        (_SHAPE, torch.float32, 6, "no support for GPUs of compute capability 6.x"),
        (_SHAPE, torch.float64, 9, "no support for float64"),
        (AttentionShape(8, 2, 512, 1.0), torch.float32, 9, "no support for head_dim 512"),
    ],
)
def test_refusal_says_why(
    shape: AttentionShape, dtype: torch.dtype, family: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"triton_paged has {reason}"):
        choose(shape, dtype, family, "triton_paged")


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        choose(_SHAPE, torch.float32, 0, "torhc")


def test_all_load() -> None:
    for name in ATTENTION:
        assert ATTENTION.load(name).capabilities.dtypes
