# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Prompts by FlashInfer (fa3 on compute capability 9, fa2 elsewhere); decode rows, and steps in
CUDA graphs, by the project's own kernels.

On an H100 the own decode was faster than FlashInfer's XQA at every size measured, see
benchmarks/LOG.md. FlashInfer compiles a module at its first use: only those that lie there built
are used.
"""

import functools
import itertools
from pathlib import Path

import numpy as np
import torch

from llmserve.attention.base import (
    AttentionMetadata,
    AttentionShape,
    Capabilities,
    PagedAttention,
)

try:
    import flashinfer
    from flashinfer.jit import env as jit_env
    from flashinfer.jit.attention.modules import get_batch_prefill_uri
except ImportError:
    flashinfer = None

_RING = 3  # plans whose copy to the device may be under way: steps in flight + 1
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


class FlashInferAttention(PagedAttention):
    """BatchPrefillWithPagedKVCacheWrapper, planned once a step."""

    capabilities = Capabilities(
        families=(8, 9, 10, 12),
        head_dims=(64, 128, 256),
        dtypes=(torch.bfloat16, torch.float16),
        window=False,  # fa3 reads what lies before a window: NaN there becomes NaN (0.6.13)
        softcap=False,
        graph="mixed",
    )
    own_prefill = False

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        family = torch.cuda.get_device_capability(device)[0]
        self._wrappers = itertools.cycle(
            [
                flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                    _workspace(device), "HND", backend=_kind(family)
                )
                for _ in range(_RING)
            ]
        )
        self._wrapper = next(self._wrappers)

    @classmethod
    def missing(cls, shape: AttentionShape, dtype: torch.dtype, family: int) -> str | None:
        """FlashInfer, or its module for these layers."""
        if flashinfer is None:
            return "flashinfer-python installed"
        name = get_batch_prefill_uri(
            _kind(family), dtype, dtype, dtype, torch.int32, shape.head_dim, shape.head_dim, 0,
            False, False, False,
        )  # fmt: skip
        folders = (jit_env.FLASHINFER_AOT_DIR, jit_env.FLASHINFER_JIT_DIR)
        if not any((Path(folder) / name / f"{name}.so").exists() for folder in folders):
            return f"built module {name}"
        return None

    def plan(self, metadata: AttentionMetadata) -> None:
        """Scratch for the decode rows, FlashInfer's plan for the others."""
        super().plan(metadata)
        shape, rows, size = self.shape, metadata.num_decode_rows, metadata.block_size
        width = metadata.block_table.shape[1]
        if metadata.row_counts is not None or rows == metadata.num_rows:
            return
        lengths = np.array(metadata.seq_lens_cpu[rows:])
        pages = -(-lengths // size)
        page_starts = np.concatenate(([0], np.cumsum(pages)))
        row = np.repeat(np.arange(rows, metadata.num_rows), pages)
        at = row * width + np.arange(page_starts[-1]) - np.repeat(page_starts[:-1], pages)
        query_starts = np.concatenate(([0], np.cumsum(metadata.query_lens_cpu[rows:])))
        at_device = torch.from_numpy(at).pin_memory().to(self.device, non_blocking=True)
        self._wrapper = next(self._wrappers)
        self._wrapper.plan(
            *(_pinned(values) for values in (query_starts, page_starts)),
            metadata.block_table.view(-1).index_select(0, at_device),
            _pinned(lengths - (pages - 1) * size),
            shape.num_heads, shape.num_kv_heads, shape.head_dim, size,
            causal=True, sm_scale=shape.scale, q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )  # fmt: skip

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """See AttentionBackend."""
        out, rows = super().forward(query, kv_cache, metadata), metadata.num_decode_rows
        if metadata.row_counts is None and rows < metadata.num_rows:
            self._wrapper.run(query[rows:], kv_cache, out=out[rows:])
        return out


def _kind(family: int) -> str:
    return "fa3" if family == 9 else "fa2"


def _pinned(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32)).pin_memory()


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    """Scratch of all wrappers: they run on one stream."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
