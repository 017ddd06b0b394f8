# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Paged attention by the project's own Triton kernels: every install with a GPU has it."""

import torch

from llmserve import envs
from llmserve.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    Capabilities,
)
from llmserve.kernels.paged_attention import DecodeScratch, paged_decode, paged_prefill


class TritonPagedAttention(AttentionBackend):
    """Split-KV decode for rows of one token, a prefill kernel for the others."""

    capabilities = Capabilities(
        families=(8, 9, 10, 12, *([0] if envs.TRITON_INTERPRET else [])),
        head_dims=tuple(range(16, 257, 16)),
        dtypes=(torch.float32,)
        if envs.TRITON_INTERPRET  # its bfloat16 arithmetic is wrong
        else (torch.bfloat16, torch.float16, torch.float32),
        window=True,
        softcap=True,
        graph="mixed",
    )

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.scratch = DecodeScratch(device)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Scratch for the decode rows."""
        shape = self.shape
        keys = metadata.block_table.shape[1] * metadata.block_size
        if metadata.num_decode_rows:
            self.scratch.fit(
                metadata.num_decode_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim,
                min(keys, shape.window or keys),
            )  # fmt: skip

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """See AttentionBackend."""
        shape, rows = self.shape, metadata.num_decode_rows
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        counts = metadata.row_counts
        if rows:
            paged_decode(
                query[:rows], kv_cache, metadata.block_table, metadata.seq_lens, out,
                self.scratch, counts, shape.scale, shape.window, shape.softcap,
            )  # fmt: skip
        first = 0 if counts is not None else rows
        if first < metadata.num_rows:
            paged_prefill(
                query, kv_cache, metadata.block_table, metadata.query_start, metadata.seq_lens,
                out, first, counts, shape.scale, shape.window, shape.softcap,
            )  # fmt: skip
        return out
