# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve import envs
from llmserve.kernels import triton_jit
from llmserve.kernels.compile_only import compile_only
from llmserve.kernels.rms_norm import rms_norm_torch, rms_norm_triton

if not envs.TRITON_INTERPRET:
    from triton import knobs

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
            with compile_only(arch) as done:
                assert _norm(2048).device.type == "meta"
            assert [kernel.name for kernel in done] == ["_rms_norm_kernel"]
            assert 0 < done[0].shared < 1024
        assert cache == [False, False]  # the second was still in memory

    def test_nothing_stays_changed() -> None:
        x = torch.ones(1, 4)
        before = triton_jit._has_pdl
        with compile_only(90):
            assert triton_jit.pdl_of(x)["PDL"]
        with compile_only(80):
            assert not triton_jit.pdl_of(x)["PDL"]
        assert triton_jit._has_pdl is before
        assert triton_jit.pdl_of(x) == {"PDL": False}

    @pytest.mark.gpu
    def test_a_card_finds_what_was_compiled_without_it(cache: list[bool]) -> None:
        major, minor = torch.cuda.get_device_capability()
        with compile_only(10 * major + minor):
            _norm(1536)
        ones = torch.ones(3, 1536, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(_norm(1536, "cuda"), rms_norm_torch(ones, ones[0], 1e-6))
        assert cache == [False, True]
