# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The order of q/k norm, rope and cache write; what lies in the cache afterwards."""

import torch

from llmserve.attention.base import AttentionBackend, AttentionMetadata, AttentionShape
from llmserve.layers.attention import Attention
from llmserve.layers.base import Build
from llmserve.layers.forward_batch import ForwardBatch, LayerKV
from llmserve.layers.norm import RMSNorm
from llmserve.layers.rotary import cos_sin_cache
from llmserve.quantization.unquantized import UnquantizedLinear

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 8, 4


class Echo(AttentionBackend):
    """Gives the query back."""

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        return query


def test_norm_then_rope_then_write() -> None:
    shape = AttentionShape(HEADS, KV_HEADS, DIM, 1.0)
    table = cos_sin_cache({"rope_type": "default", "rope_theta": 100.0}, DIM, 64, 64, CPU)
    build = Build(torch.float32, CPU, UnquantizedLinear, 64)
    norms = [RMSNorm(build, DIM, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
        norm.finalize()
    positions, slots = torch.tensor([5, 30, 6]), torch.tensor([9, 4, 11])
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, 3]),
        seq_lens=torch.tensor([7]),
        block_table=torch.zeros(1, 2, dtype=torch.int32),
        slot_mapping=slots,
        block_size=BLOCK,
        num_rows=1,
        num_decode_rows=0,
        query_lens_cpu=[3],
        seq_lens_cpu=[7],
    )
    cache = torch.full((3, 2, KV_HEADS, BLOCK, DIM), torch.nan)
    layer = LayerKV(cache, Echo(shape, torch.float32, CPU), metadata)
    batch = ForwardBatch(positions, positions, [layer])
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * DIM)
    original = qkv.clone()
    out = Attention(0, shape, table)(qkv, batch, *norms)

    query, key, value = original.view(3, -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    expected = rotate(norms[0](query), positions)
    torch.testing.assert_close(out, expected.flatten(1))
    flat = cache.transpose(2, 3).transpose(1, 2).flatten(0, 1)  # [slot, 2, kv_head, dim]
    torch.testing.assert_close(flat[slots, 0], rotate(norms[1](key), positions))
    torch.testing.assert_close(flat[slots, 1], value)
    unwritten = [slot for slot in range(3 * BLOCK) if slot not in slots.tolist()]
    assert flat[unwritten].isnan().all()


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + dim / 2) as complex numbers, turned by position / 100^(2i / dim)."""
    pairs = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :])
    angles = positions[:, None, None] / 100.0 ** (torch.arange(0, DIM, 2) / DIM)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)
