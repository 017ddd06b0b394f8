# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmserve import envs
from llmserve.errors import ConfigError
from llmserve.kernels.paged_attention import num_splits
from llmserve.kernels.triton_jit import Card
from llmserve.worker.compile_steps import compile_steps, parse_cards
from tests.helpers.tiny_runner import CONFIGS, describe_tiny


def test_cards() -> None:
    assert parse_cards("sm_90, 120") == [Card("sm_90", 90, 132), Card("sm_120", 120, 188)]
    with pytest.raises(ConfigError, match="--card 'sm_91' is not known .known: sm_80, sm_89"):
        parse_cards("sm_90,sm_91")


if not envs.TRITON_INTERPRET:
    from triton.runtime.jit import JITFunction

    def _launches(
        monkeypatch: pytest.MonkeyPatch,
        architecture: str,
        arch: int,
        dtype: torch.dtype,
        max_rows: int = 24,
        **config: int,
    ) -> dict[str, list[dict[str, Any]]]:
        """The arguments of every launch by kernel; nothing is compiled."""
        seen: dict[str, list[dict[str, Any]]] = {}

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            assert warmup and all(size > 0 for size in grid)
            named = dict(zip(kernel.arg_names, args, strict=False)) | options
            seen.setdefault(kernel.__name__, []).append(named)
            return SimpleNamespace(name=kernel.__name__, metadata=SimpleNamespace(shared=0))

        monkeypatch.setattr(JITFunction, "run", run)
        card = parse_cards(f"sm_{arch}")[0]
        model = describe_tiny(architecture)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        model = dataclasses.replace(model, hf_config=model.hf_config | sizes | config)
        done = compile_steps(
            model, dtype, card, max_rows=max_rows, max_model_len=160, block_size=16
        )
        assert len(done) > sum(map(len, seen.values())) > 10  # each is compiled once
        return seen

    @pytest.mark.parametrize("architecture", CONFIGS)
    def test_steps_launch_what_a_start_launches(
        architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = _launches(monkeypatch, architecture, 90, torch.bfloat16)
        assert {name.strip("_").removesuffix("_kernel") for name in seen} == {
            "linear", "rms_norm", "gated_act", "rope_write", "decode", "prefill", "join", "scan",
            "truncate", "mask", "penalize", "select",
        }  # fmt: skip
        own = [n for n in seen["_decode_kernel"] if not n["PROGRAMS"]]
        splits = {num_splits(rows, 2, 160, 132) for rows in range(1, 25)}
        assert {n["SPLITS"] for n in own if not n["WINDOW"]} == splits
        assert {n["PROGRAMS"] for n in seen["_decode_kernel"]} == {0, 264}
        for name in ("_prefill_kernel", "_join_kernel"):
            assert {n["PROGRAMS"] for n in seen[name]} == {132}
            assert {n["COUNTED"] for n in seen[name]} == {False, True}
        windows = {0} | ({20} if "Gemma" in architecture else set())
        for name in ("_decode_kernel", "_prefill_kernel", "_join_kernel"):
            assert {n["WINDOW"] for n in seen[name]} == windows
        assert {n["TILE_M"] for n in seen["_linear_kernel"]} == {1, 8, 16}
        assert {n["TILE_T"] for n in seen["_rope_write_kernel"]} == {1, 16}
        assert all(n["PDL"] and n["launch_pdl"] for n in seen["_linear_kernel"])
        truncated = {(n["RANDOM"], n["TRUNCATED"]) for n in seen["_scan_kernel"] if "RANDOM" in n}
        assert truncated == {(False, False), (True, False), (True, True)}

    def test_older_cards_have_no_dependent_launch(monkeypatch: pytest.MonkeyPatch) -> None:
        seen = _launches(monkeypatch, "LlamaForCausalLM", 80, torch.float16)
        names = "linear", "decode", "prefill", "join", "rope_write"
        for name in (f"_{name}_kernel" for name in names):
            assert not any(launch["PDL"] for launch in seen[name])
