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
from llmserve.kernels.paged_attention import num_splits, paged_decode, paged_prefill


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
        graph="decode",
    )

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.num_sms = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else 4
        )
        self.partial = torch.empty(0, device=device)
        self.partial_lse = torch.empty(0, device=device)

    def plan(self, metadata: AttentionMetadata) -> None:
        """Scratch for the decode rows."""
        rows, shape = metadata.num_decode_rows, self.shape
        if rows == 0:
            return
        keys = metadata.block_table.shape[1] * metadata.block_size
        splits = num_splits(rows, shape.num_kv_heads, min(keys, shape.window or keys), self.num_sms)
        size = (rows, shape.num_heads, splits)
        self.partial = torch.empty(*size, shape.head_dim, dtype=torch.float32, device=self.device)
        self.partial_lse = torch.empty(size, dtype=torch.float32, device=self.device)

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """See AttentionBackend."""
        shape, rows = self.shape, metadata.num_decode_rows
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if rows:
            paged_decode(
                query[:rows], kv_cache, metadata.block_table, metadata.seq_lens, out,
                self.partial, self.partial_lse, shape.scale, shape.window, shape.softcap,
            )  # fmt: skip
        if rows < metadata.num_rows:
            paged_prefill(
                query, kv_cache, metadata.block_table, metadata.query_start, metadata.seq_lens,
                out, rows, rows, shape.scale, shape.window, shape.softcap,
            )  # fmt: skip
        return out
