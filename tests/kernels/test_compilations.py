# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmserve import envs
from llmserve.kernels import compilations as module
from llmserve.kernels.compilations import Compilations, compilations
from llmserve.kernels.compile_only import compile_only
from llmserve.kernels.silu_mul import gated_act_triton
from llmserve.kernels.triton_jit import Card

if not envs.TRITON_INTERPRET:
    from triton import knobs
    from triton.runtime.jit import JITFunction

    def test_counts_what_triton_compiles_and_what_it_finds(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heard: list[bool] = []
        monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
        monkeypatch.setattr(
            knobs.compilation, "listener", lambda *, cache_hit, **rest: heard.append(cache_hit)
        )
        counter = Compilations()
        counter.watch()
        counter.watch()  # hooks once
        before = dict(counter.counts)
        kernel: JITFunction = sys.modules[gated_act_triton.__module__]._gated_act_kernel  # type: ignore[type-arg]
        for _ in range(2):
            with compile_only(Card("", 90, 132)):
                gated_act_triton(torch.empty(2, 64, device="meta"), "silu")
                gated_act_triton(torch.empty(3, 64, device="meta"), "silu")  # in memory
            kernel.device_caches.pop("sm_90")  # as in another process
        assert counter.since(before) == {"triton": 1, "triton_load": 1}
        assert len(counter.compiled) == 1 and counter.found == counter.compiled
        assert list(counter.recent) == ["triton _gated_act_kernel", "triton_load _gated_act_kernel"]
        assert heard == [False, True]  # whoever listened before still does
        assert counter.since(dict(counter.counts)) == {}


def test_counts_what_flashinfer_builds_and_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class JitSpec:
        name = "batch_prefill"

        def build(self, verbose: bool, need_lock: bool = True) -> tuple[bool, bool]:
            return verbose, need_lock

        def load(self, path: str) -> str:
            return path

        def build_and_load(self) -> Any:
            return self.build(True, need_lock=False), self.load("x.so")

    monkeypatch.setattr(module, "knobs", None)
    monkeypatch.delitem(sys.modules, "flashinfer.jit.core", raising=False)
    counter = Compilations()
    counter.watch()  # without it there is nothing to hook
    monkeypatch.setitem(sys.modules, "flashinfer.jit.core", SimpleNamespace(JitSpec=JitSpec))  # type: ignore[arg-type]
    counter.watch()
    counter.watch()
    assert JitSpec().build_and_load() == ((True, False), "x.so")
    assert JitSpec().load("y.so") == "y.so"
    assert counter.since(dict.fromkeys(counter.counts, 0)) == {
        "flashinfer": 1,
        "flashinfer_load": 2,
    }
    assert compilations() is compilations()
