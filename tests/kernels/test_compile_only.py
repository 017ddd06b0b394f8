# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve import envs
from llmserve.kernels.compile_only import compile_only
from llmserve.kernels.penalties import penalize_triton
from llmserve.kernels.rms_norm import rms_norm_torch, rms_norm_triton
from llmserve.kernels.token_mask import mask_logits_triton
from llmserve.kernels.top_logprobs import top_logprobs_triton
from llmserve.kernels.triton_jit import Card, card_of, pdl_of
from llmserve.worker.device import present_card

if not envs.TRITON_INTERPRET:
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    @pytest.fixture
    def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """An empty cache, and of each kernel asked for whether it was found there."""
        found: list[bool] = []

        def listen(*, cache_hit: bool, **rest: Any) -> None:
            found.append(cache_hit)

        monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
        monkeypatch.setattr(knobs.compilation, "listener", listen)
        return found

    def _norm(hidden: int, device: str = "meta") -> torch.Tensor:
        x = torch.ones(3, hidden, device=device, dtype=torch.bfloat16)
        return rms_norm_triton(x, x[0], 1e-6)

    def test_compiles_once_a_card_and_runs_nothing(cache: list[bool]) -> None:
        for arch in (90, 90, 120):
            with compile_only(Card("", arch, 132)) as done:
                assert _norm(2048).device.type == "meta"
            assert [kernel.name for kernel in done] == ["_rms_norm_kernel"]
            assert 0 < done[0].shared < 1024
        assert cache == [False, False]  # the second was still in memory

    def test_nothing_stays_changed() -> None:
        x, real = torch.ones(1, 4, device="meta"), torch.ones(1, 4)
        before = driver._active, JITFunction.run
        with compile_only(Card("", 90, 132)):
            assert pdl_of(x)["PDL"] and not pdl_of(real)["PDL"]
            assert card_of(x.device) == Card("", 90, 132)
        with compile_only(Card("", 80, 108)):
            assert not pdl_of(x)["PDL"]
        assert (driver._active, JITFunction.run) == before
        assert pdl_of(x) == {"PDL": False} and card_of(x.device) is None

    def test_a_view_of_later_rows_needs_no_other_kernel(cache: list[bool]) -> None:
        """Rows that asked for something are views of the batch, aligned to nothing."""
        width = 97
        logits = torch.zeros(4, width)
        ids, counts = torch.zeros(4, dtype=torch.int64), torch.zeros(4, width, dtype=torch.int32)
        words = torch.zeros(4, 4, dtype=torch.int32)
        for k, rows in ((1, slice(0, 2)), (16, slice(1, 3))):
            with compile_only(Card("", 90, 132)):
                top_logprobs_triton(logits[rows], ids[rows], k)
                penalize_triton(logits[rows], counts, ids[:2], torch.zeros(2, 3))
                mask_logits_triton(logits[rows], words[:2])
            assert cache == [False] * 4

    @pytest.mark.gpu
    def test_a_card_finds_what_was_compiled_without_it(cache: list[bool]) -> None:
        card = present_card()
        assert card is not None
        with compile_only(card):
            _norm(1536)
        ones = torch.ones(3, 1536, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(_norm(1536, "cuda"), rms_norm_torch(ones, ones[0], 1e-6))
        assert cache == [False, True]
