# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""On a GPU in bfloat16, no family is further from float32 than transformers' own bfloat16 is.

Through the whole engine: log-probabilities of every prompt position, once with prompts run whole
(the prefill kernel) and once token by token (the decode kernel).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmserve.executor.uniproc import UniProcExecutor
from tests.helpers.engine import Engine
from tests.helpers.tiny_models import FAMILIES, VOCAB_SIZE, write_tiny_model

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
WORST_RATIO = 1.25


def _prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    return [np.random.default_rng().integers(5, VOCAB_SIZE, n).tolist() for n in lengths]


@torch.inference_mode()
def _theirs(folder: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    model.cuda()
    outputs = [model(torch.tensor([prompt]).cuda()).logits[0, :-1] for prompt in prompts]
    return [output.float().log_softmax(-1).cpu() for output in outputs]


def _ours(folder: Path, prompts: list[list[int]], **flags: Any) -> list[torch.Tensor]:
    engine = Engine(folder, device="cuda", dtype="bfloat16", kv_cache_memory_bytes=1 << 30, **flags)
    executor = engine.core.executor
    assert isinstance(executor, UniProcExecutor)
    kinds = {type(backend).__name__ for backend in executor.worker.runner.backends.values()}
    ids = [engine.add(prompt, max_tokens=1, prompt_logprobs=-1) for prompt in prompts]
    engine.run()
    engine.close()
    results = []
    for request_id, prompt in zip(ids, prompts, strict=True):
        columns = [
            e.prompt_logprobs.unpack()
            for e in engine.results[request_id].extras
            if e.prompt_logprobs
        ]
        tokens = torch.tensor(np.concatenate([column[0] for column in columns])[:, 1:])
        values = torch.tensor(np.concatenate([column[1] for column in columns])[:, 1:])
        assert len(tokens) == len(prompt) - 1
        results.append(torch.zeros(values.shape).scatter_(1, tokens.long(), values))
    print(f"{folder.name}: {', '.join(sorted(kinds))}")
    return results


def _error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Mean over positions of the relative error of a position's log-probabilities."""
    errors = [(g - w).norm(dim=-1) / w.norm(dim=-1) for g, w in zip(got, want, strict=True)]
    return float(torch.cat(errors).mean())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_transformers(family: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family, seed=7, **SHAPE)
    for lengths, flags in (
        ((4200, 4100, 333, 17), {}),
        ((300, 40), {"max_num_batched_tokens": 2, "max_num_seqs": 2}),
    ):
        prompts = _prompts(lengths)
        want = _theirs(folder, prompts, torch.float32)
        theirs = _error(_theirs(folder, prompts, torch.bfloat16), want)
        ours = _error(_ours(folder, prompts, **flags), want)
        print(f"{family} {lengths}: ours {ours:.5f} transformers {theirs:.5f} {ours / theirs:.3f}")
        assert ours <= WORST_RATIO * theirs
