# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""FlashInferAttention with FlashInfer's part done by torch and its own in the interpreter; run by
test_flashinfer.py in a child process."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmserve.attention import flashinfer as module
from llmserve.attention.base import AttentionMetadata, AttentionShape
from llmserve.attention.flashinfer import FlashInferAttention
from llmserve.attention.torch_sdpa import TorchAttention
from tests.helpers.paged import CASES, make_case

CPU = torch.device("cpu")


class _Wrapper:
    """The calls of BatchPrefillWithPagedKVCacheWrapper that are made, by what they are told."""

    shape: AttentionShape

    def __init__(self, workspace: torch.Tensor, layout: str, backend: str) -> None:
        assert (layout, backend) == ("HND", "fa3")

    def plan(
        self, query_starts: torch.Tensor, page_starts: torch.Tensor, pages: torch.Tensor,
        last_page: torch.Tensor, *sizes: int, **options: Any,
    ) -> None:  # fmt: skip
        assert {t.dtype for t in (query_starts, page_starts, pages, last_page)} == {torch.int32}
        size = sizes[3]
        counts = page_starts.diff()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, of_row in enumerate(pages.split(counts.tolist())):
            table[row, : len(of_row)] = of_row
        lengths = ((counts - 1) * size + last_page).tolist()
        queries = query_starts.diff().tolist()
        assert options["causal"]
        self._metadata = AttentionMetadata(
            query_starts, torch.tensor(lengths, dtype=torch.int32), table, pages, size,
            len(lengths), 0, queries, lengths,
        )  # fmt: skip

    def run(self, query: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor) -> None:
        attention = TorchAttention(self.shape, torch.float32, CPU)
        attention.plan(self._metadata)
        out.copy_(attention.forward(query, kv_cache, self._metadata))


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", ["decode", "prefill", "chunk", "mixed", "smollm", "block_8"])
def test_equals_float64(name: str, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a step by itself, and as a graph that is told how many rows there are."""
    case = make_case(**CASES[name])
    monkeypatch.setattr(_Wrapper, "shape", case.shape, raising=False)
    flashinfer = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=_Wrapper)
    monkeypatch.setattr(module, "flashinfer", flashinfer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(module, "_WORKSPACE_BYTES", 1)
    backend = FlashInferAttention(case.shape, torch.float32, CPU)
    if counted:
        case.count_on_device()
    backend.plan(case.metadata)
    out = backend.forward(case.query, case.kv_cache, case.metadata)
    torch.testing.assert_close(out.double(), case.expected(), atol=2e-5, rtol=1e-4)
