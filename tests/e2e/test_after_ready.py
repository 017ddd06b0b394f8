# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""On a GPU: once an engine is ready, no first use of anything compiles or loads a kernel."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve import envs
from llmserve.core.structured_outputs import GrammarSpec
from llmserve.kernels.compilations import compilations
from tests.helpers.dummy_model import gpu_engine, write_dummy_model
from tests.helpers.engine import Engine

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "random": {"temperature": 1.0},
    "seed": {"temperature": 0.7, "seed": 3},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "limits": {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {5: 2.0, 9: -2.0}},
    "bad_words": {"bad_words_token_ids": [[5, 6], [7]]},
    "allowed": {"allowed_token_ids": [5, 6, 7, 8]},
    "min_tokens": {"min_tokens": 4, "ignore_eos": False},
    "logprobs": {"logprobs": 4},
    "logprobs_random": {"temperature": 1.0, "top_k": 9, "logprobs": 0},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "all": {
        "temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.3, "logit_bias": {5: 1.0},
        "logprobs": 2, "prompt_logprobs": 1, "min_tokens": 2, "allowed_token_ids": [5, 6, 7],
    },
}  # fmt: skip
GRAMMARS = {
    "grammar": GrammarSpec(backend="xgrammar", kind="regex", text="[a-z]{3,8}"),
}


def _prompt(length: int) -> list[int]:
    return np.random.default_rng().integers(5, 300, length).tolist()


def use_everything(engine: Engine, max_rows: int) -> None:
    """Each feature alone and beside others, each number of rows, prompts of many lengths."""
    for params in FEATURES.values():
        engine.generate([_prompt(9)], max_tokens=6, **params)
    for grammar in GRAMMARS.values():
        engine.generate([_prompt(9)] * 2, max_tokens=6, grammar=grammar)
    for params in FEATURES.values():
        engine.add(_prompt(12), max_tokens=12, **params)
    engine.run()
    for rows in range(1, max_rows + 1):
        for params in ({}, {"temperature": 1.0, "top_p": 0.9}):
            engine.generate([_prompt(3)] * rows, max_tokens=4, **params)
    for length in (1, 15, 16, 17, 33, 64, 65, 127, 129, 300, 700):
        engine.generate([_prompt(length), _prompt(5)], max_tokens=3, temperature=1.0)
    shared = _prompt(200)
    engine.generate([shared], max_tokens=2)
    engine.generate([[*shared, 7, 8]], max_tokens=2)
    engine.generate([_prompt(150) for _ in range(12)], max_tokens=60)  # more than the cache holds
    stats = engine.core.stats()
    assert stats.prefix_hits > 0 and stats.num_chunked_prefills > 0 and stats.num_preemptions > 0


def _engine(folder: Path, max_rows: int, **flags: Any) -> Engine:
    return gpu_engine(
        folder, max_num_seqs=max_rows, max_num_batched_tokens=256, num_gpu_blocks_override=66,
        **flags,
    )  # fmt: skip


if not envs.TRITON_INTERPRET:

    def test_uses_everything(tmp_path: Path) -> None:
        """On a CPU, that each feature can be asked for and the pool is small enough."""
        folder = write_dummy_model(tmp_path, hidden_size=64, num_hidden_layers=1)
        engine = _engine(folder, 6, device="cpu", dtype="float32", cpu_threads=1)
        try:
            use_everything(engine, 6)
            assert engine.core.stats().compilations == {}
        finally:
            engine.close()

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "flags",
        [
            {},
            {"attention_backend": "triton_paged"},
            {"cudagraph_mode": "FULL_DECODE_ONLY"},
            {"cudagraph_mode": "FULL_AND_PIECEWISE"},
            {"enforce_eager": True},
            {"logprobs_mode": "processed_logprobs"},
        ],
        ids=str,
    )
    def test_nothing_compiles_after_ready(flags: dict[str, Any], tmp_path: Path) -> None:
        engine = _engine(write_dummy_model(tmp_path), 40, **flags)
        compilations().recent.clear()
        try:
            use_everything(engine, 40)
            assert engine.core.stats().compilations == {}, list(compilations().recent)
        finally:
            engine.close()
