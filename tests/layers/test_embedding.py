# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest
import torch
import torch.nn.functional as F

from llmserve.kernels import cpu
from llmserve.layers.base import Build
from llmserve.layers.embedding import Embedding, LMHead
from llmserve.quantization.unquantized import UnquantizedLinear

BUILD = Build(torch.bfloat16, torch.device("cpu"), UnquantizedLinear, 1)


def test_scale_is_rounded_to_the_dtype_before_it_multiplies() -> None:
    """As Gemma was trained: sqrt(1152) is 34 in bfloat16."""
    layer = Embedding(BUILD, 10, 16, scale=1152**0.5)
    layer.weight.data.normal_()
    ids = torch.tensor([3, 9, 0])
    assert torch.equal(layer(ids), layer.weight[ids] * 34.0)


def test_tied_head_multiplies_by_the_embedding_and_leaves_it_whole() -> None:
    embedding = Embedding(BUILD, 50, 16)
    head = LMHead(BUILD, embedding, tied=True)
    assert head.weight is embedding.weight
    embedding.weight.data.normal_()
    head.finalize()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = F.linear(x.float(), embedding.weight.float())
    torch.testing.assert_close(head.logits(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding(torch.tensor([7]))[0], embedding.weight[7])


def test_untied_head_has_its_own_weight() -> None:
    embedding = Embedding(BUILD, 50, 16)
    head = LMHead(BUILD, embedding, tied=False)
    assert head.weight.shape == (50, 16) and head.weight is not embedding.weight


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("largest", [1e-8, 0.1, 60_000.0, 1e6])
def test_logits_of_16_bit_weights_are_float32_at_any_scale(
    largest: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where float16 would lose bits (under 6e-5) or overflow (over 65,504)."""
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)
    embedding = Embedding(BUILD, 300, 64)
    embedding.weight.data.uniform_(-largest, largest)
    embedding.weight.data[0, 0] = largest
    head = LMHead(BUILD, embedding, tied=True)
    head.finalize()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = F.linear(x.double(), embedding.weight.double())
    lost = x.double().abs().sum(1).max().item() * 2**-25
    logits = head.logits(x)
    assert logits.dtype == torch.float32
    bound = lost + 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=bound)
