# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import torch
import torch.nn.functional as F

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
