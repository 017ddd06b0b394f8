# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention by torch alone: the CPU's backend, and the one that runs anywhere.

Rows of one query token go to csrc/cpu_decode.cpp where that is compiled. Else they are batched:
their blocks are gathered by one index_select into [rows, 2, num_kv_heads, tokens, head_dim] and
attended to by one call. Rows whose lengths differ by more than half go to batches of their own, so
that padding never more than doubles the gather. A row of several query tokens is a batch by itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmserve.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    Capabilities,
)
from llmserve.kernels import cpu

_SOFTCAP_SLICE = 256  # query tokens whose scores are held at once


@dataclass(slots=True)
class _Batch:
    """Rows that are attended to in one call; all have `query_len` tokens."""

    query: slice | torch.Tensor  # of tokens
    num_rows: int
    query_len: int
    blocks: torch.Tensor  # int64 [rows * 2 * num_kv_heads * blocks]: of (block, 2, head) chunks
    keep: slice | None  # of the gathered tokens, where it is not all of them
    poison: torch.Tensor | None  # int64: gathered tokens that were never written
    mask: torch.Tensor | None  # additive; [rows, 1, 1, keys] or [queries, keys]
    causal: bool


class TorchAttention(AttentionBackend):
    """scaled_dot_product_attention over gathered blocks."""

    capabilities = Capabilities(
        families=(0, 7, 8, 9, 10, 11, 12),
        head_dims=None,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        window=True,
        softcap=True,
    )

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.batches: list[_Batch] = []
        self.sides = torch.arange(2 * shape.num_kv_heads, device=device).unsqueeze(1)
        self.compiled = None
        if shape.head_dim % 16 == 0:
            self.compiled = cpu.compiled_for(torch.empty(0, dtype=dtype, device=device))

    def plan(self, metadata: AttentionMetadata) -> None:
        """Gather indices and masks."""
        lengths = metadata.seq_lens_cpu
        gathered = 0 if self.compiled is not None else metadata.num_decode_rows
        order = sorted(range(gathered), key=lengths.__getitem__, reverse=True)
        groups: list[list[int]] = []
        for row in order:
            if not groups or 2 * self._reach(lengths[row]) < self._reach(lengths[groups[-1][0]]):
                groups.append([])
            groups[-1].append(row)
        self.batches = []
        for rows in groups:
            if len(groups) == 1:
                rows = list(range(metadata.num_decode_rows))
            self.batches.append(self._decode(rows, len(groups) == 1, metadata))
        start = metadata.num_decode_rows
        for row in range(metadata.num_decode_rows, metadata.num_rows):
            self.batches.append(self._chunk(row, start, metadata))
            start += metadata.query_lens_cpu[row]

    def _reach(self, length: int) -> int:
        return min(length, self.shape.window or length)

    def _decode(self, rows: list[int], whole: bool, metadata: AttentionMetadata) -> _Batch:
        if len(rows) == 1:
            return self._chunk(rows[0], rows[0], metadata)
        device, size = self.device, metadata.block_size
        pick = slice(0, len(rows)) if whole else torch.tensor(rows, device=device)
        length = metadata.seq_lens[pick].long().unsqueeze(1)  # [rows, 1]
        lowest = length - self.shape.window if self.shape.window else torch.zeros_like(length)
        first, last = lowest.clamp_(min=0) // size, (length - 1) // size
        reach = [
            (metadata.seq_lens_cpu[r] - 1) // size
            - (metadata.seq_lens_cpu[r] - self._reach(metadata.seq_lens_cpu[r])) // size
            for r in rows
        ]
        index = first + torch.arange(max(reach) + 1, device=device)
        # Past a row's last block its first is repeated: written to the end unless it is the only.
        block_at = torch.where(index <= last, index, first)  # [rows, blocks]
        blocks = metadata.block_table[pick].long().gather(1, block_at)
        offsets = torch.arange(size, device=device)
        inside = (index.unsqueeze(2) * size + offsets).flatten(1)  # positions [rows, keys]
        hidden = (inside < lowest) | (inside >= length)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=device)
        mask.masked_fill_(hidden, -torch.inf)
        unwritten = ((block_at.unsqueeze(2) * size + offsets).flatten(1) >= length).nonzero()
        poison = None
        if len(unwritten):
            keys = inside.shape[1]
            sides = 2 * self.shape.num_kv_heads
            poison = (
                unwritten[:, :1] * (sides * keys) + self.sides.T * keys + unwritten[:, 1:]
            ).flatten()
        return _Batch(
            pick, len(rows), 1, self._chunks(blocks), None, poison,
            mask[:, None, None], False,
        )  # fmt: skip

    def _chunk(self, row: int, start: int, metadata: AttentionMetadata) -> _Batch:
        size, window = metadata.block_size, self.shape.window
        length, query_len = metadata.seq_lens_cpu[row], metadata.query_lens_cpu[row]
        lowest = max(0, length - query_len - window + 1) if window else 0
        first = lowest // size
        blocks = metadata.block_table[row, first : (length - 1) // size + 1].long()
        keys = length - lowest
        mask = None
        windowed = window is not None and keys > window
        causal = query_len > 1 and keys == query_len and not windowed
        if query_len > 1 and not causal:
            position = torch.arange(length - query_len, length, device=self.device).unsqueeze(1)
            key = torch.arange(lowest, length, device=self.device)
            hidden = key > position
            if window is not None and windowed:
                hidden |= key <= position - window
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            mask.masked_fill_(hidden, -torch.inf)
        skipped = lowest - first * size
        whole = skipped == 0 and length % size == 0
        keep = None if whole else slice(skipped, length - first * size)
        query = slice(start, start + query_len)
        return _Batch(
            query, 1, query_len, self._chunks(blocks.unsqueeze(0)), keep, None, mask, causal
        )

    def _chunks(self, blocks: torch.Tensor) -> torch.Tensor:
        """[rows, blocks] -> rows of the cache seen as [block * 2 * head, block_size * head_dim]."""
        return (blocks.unsqueeze(1) * len(self.sides) + self.sides).flatten()

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """See AttentionBackend."""
        shape = self.shape
        heads, dim = shape.num_kv_heads, shape.head_dim
        chunks = kv_cache.view(-1, metadata.block_size * dim)
        rows = metadata.num_decode_rows
        out = None
        if len(self.batches) != 1 or (rows and self.compiled is not None):
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            if rows and self.compiled is not None:
                cpu.attention(
                    self.compiled, query[:rows], kv_cache, metadata.block_table,
                    metadata.seq_lens, out, shape.scale, shape.window, shape.softcap,
                )  # fmt: skip
        for batch in self.batches:
            gathered = chunks.index_select(0, batch.blocks)
            if batch.poison is not None:
                gathered.view(-1, dim).index_fill_(0, batch.poison, 0)
            gathered = gathered.view(batch.num_rows, 2, heads, -1, dim)
            if batch.keep is not None:
                gathered = gathered[:, :, :, batch.keep]
            q = query if out is None else query[batch.query]
            k, v = gathered.unbind(1)  # [rows, kv_head, keys, head_dim]
            if batch.query_len == 1:
                # The heads of a group are the queries of its KV head; no key is repeated.
                q = q.view(batch.num_rows, heads, -1, dim)
                o = self._attend(q, k, v, batch.mask, False)
            else:
                # [kv_head, group, query, head_dim]
                q = q.view(batch.query_len, heads, -1, dim).permute(1, 2, 0, 3)
                wide = (heads, q.shape[1], -1, -1)
                k, v = (side.transpose(0, 1).expand(wide) for side in (k, v))
                o = self._attend(q, k, v, batch.mask, batch.causal).permute(2, 0, 1, 3)
            o = o.reshape(-1, shape.num_heads, dim)
            if out is None:
                return o
            out[batch.query] = o
        assert out is not None, "a step without rows"
        return out

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """[batch, heads, queries, head_dim] x [batch, heads, keys, head_dim]."""
        shape = self.shape
        if shape.softcap is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=shape.scale
            )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for low in range(0, q.shape[2], _SOFTCAP_SLICE):
            part = slice(low, low + _SOFTCAP_SLICE)
            scores = torch.matmul(q[:, :, part], k.transpose(-1, -2)).float()
            scores = torch.tanh(scores * (shape.scale / shape.softcap)) * shape.softcap
            if causal:
                above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(
                    low + 1
                )
                scores.masked_fill_(above, -torch.inf)
            elif mask is not None:
                scores += mask if mask.shape[-2] == 1 else mask[..., part, :]
            out[:, :, part] = torch.matmul(torch.softmax(scores, -1).to(q.dtype), v)
        return out
