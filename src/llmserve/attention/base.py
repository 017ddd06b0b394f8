# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What an attention backend is. Backends read the paged cache; layers/ writes it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from llmserve.kernels.paged_attention import (
    DecodeScratch,
    TileScratch,
    paged_decode,
    paged_prefill,
)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data. `families` are compute-capability majors, 0 is the CPU."""

    families: tuple[int, ...]
    head_dims: tuple[int, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    window: bool
    softcap: bool
    mla: bool = False
    graph: str = "none"  # none | decode | uniform | mixed: which batches a CUDA graph may hold


@dataclass(slots=True)
class AttentionMetadata:
    """One KV group's view of a step. Rows with one query token come first.

    Device tensors: `query_start` int32 [num_rows + 1], `seq_lens` int32 [num_rows] (tokens in the
    cache once this step's are written), `block_table` int32 [num_rows, max_blocks], `slot_mapping`
    int64 [num_tokens] (block * block_size + offset; where each token's K and V are written).
    The host knows `num_rows`, `num_decode_rows` and the two lists of lengths, so that planning
    needs no device sync.

    In a graph of mixed steps these are bounds, and `row_counts` int32 [2] on the device holds the
    number of decode rows and of rows; `query_start` of padding rows is the number of tokens.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    num_rows: int
    num_decode_rows: int
    query_lens_cpu: list[int]
    seq_lens_cpu: list[int]
    row_counts: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention. `window` counts the query's own token; None is full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(ABC):
    """Attention of one KV group and layer shape. Its state is what `plan` computed for the step."""

    capabilities: Capabilities

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @classmethod
    def missing(cls, shape: AttentionShape, dtype: torch.dtype, family: int) -> str | None:
        """What this install lacks to run layers that the capabilities allow."""
        return None

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> None:
        """Once a step and group, before the layers: whatever does not depend on q, k, v."""

    @abstractmethod
    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`query` [num_tokens, num_heads, head_dim], `kv_cache`
        [num_blocks, 2, num_kv_heads, block_size, head_dim] -> [num_tokens, num_heads, head_dim].

        Causal: the last query token of a row sees `seq_lens` tokens. This step's K and V are
        already in the cache. Whatever lies past `seq_lens` in a block may be NaN.
        """


class PagedAttention(AttentionBackend):
    """By the project's own kernels: decode rows, steps in CUDA graphs, and with `own_prefill` the
    other rows, which else are left to do."""

    own_prefill = True

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.scratch = DecodeScratch(device)
        self.tile_scratch = TileScratch(
            device, shape.num_heads // shape.num_kv_heads, shape.head_dim, dtype.itemsize
        )

    def plan(self, metadata: AttentionMetadata) -> None:
        """Scratch for the decode rows."""
        shape = self.shape
        keys = metadata.block_table.shape[1] * metadata.block_size
        if metadata.num_decode_rows and metadata.row_counts is None:
            self.scratch.fit(
                metadata.num_decode_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim,
                min(keys, shape.window or keys),
            )  # fmt: skip

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """See AttentionBackend."""
        shape, rows, counts = self.shape, metadata.num_decode_rows, metadata.row_counts
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if rows:
            paged_decode(
                query[:rows], kv_cache, metadata.block_table, metadata.seq_lens, out,
                self.scratch if counts is None else self.tile_scratch, counts, shape.scale,
                shape.window, shape.softcap,
            )  # fmt: skip
        if counts is not None or (self.own_prefill and rows < metadata.num_rows):
            paged_prefill(
                query, kv_cache, metadata.block_table, metadata.query_start, metadata.seq_lens,
                out, self.tile_scratch, rows if counts is None else 0, counts, shape.scale,
                shape.window, shape.softcap,
            )  # fmt: skip
        return out
