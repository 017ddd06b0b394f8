# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Runs a model without a worker: a poisoned paged cache, shuffled blocks, chunks as asked."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from llmserve.attention.base import AttentionBackend, AttentionMetadata
from llmserve.attention.torch_sdpa import TorchAttention
from llmserve.config.hf import ModelDescription, describe
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.core.kv_spec import AnyKVSpec, MLASpec, RecurrentStateSpec
from llmserve.layers.forward_batch import ForwardBatch, LayerKV
from llmserve.model_loader.loader import load_model
from llmserve.models.interfaces import CausalLM
from llmserve.models.registry import MODELS

CPU = torch.device("cpu")


def description_of(path: Path | str, **config: Any) -> ModelDescription:
    """Of a folder or file; `config` overrides its config.json."""
    return describe(ModelConfig(model=str(path), hf_overrides=config), LoadConfig())


def load(
    description: ModelDescription,
    *,
    dtype: torch.dtype = torch.float32,
    load_format: str = "auto",
    max_model_len: int | None = None,
) -> CausalLM:
    """The finalized model on the CPU."""
    if max_model_len is not None:
        description = dataclasses.replace(description, max_model_len=max_model_len)
    return load_model(
        MODELS.load(description.architecture),
        description,
        LoadConfig(load_format=load_format),
        dtype,
        CPU,
    )


def make_cache(
    spec: AnyKVSpec, num_blocks: int, block_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """NaN everywhere, as nothing may read what was not written."""
    if isinstance(spec, MLASpec):
        shape: tuple[int, ...] = (num_blocks, block_size, spec.latent_dim + spec.rope_dim)
    else:
        assert not isinstance(spec, RecurrentStateSpec)
        shape = (num_blocks, 2, spec.num_kv_heads, block_size, spec.head_dim)
    return torch.full(shape, torch.nan, dtype=dtype)


@torch.inference_mode()
def prompt_logits(
    net: CausalLM,
    prompts: list[list[int]],
    *,
    chunk: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    backend: type[AttentionBackend] = TorchAttention,
) -> list[torch.Tensor]:
    """float32 [prompt_len, logits_width] of each prompt, computed together, `chunk` tokens of each
    prompt a step (None: all)."""
    longest = max(map(len, prompts))
    per_row = -(-longest // block_size)
    num_blocks = 1 + per_row * len(prompts)
    order = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1))
    table = order.view(len(prompts), per_row).int()
    caches = [make_cache(spec, num_blocks, block_size, dtype) for spec in net.kv_specs]
    backends = [backend(shape, dtype, CPU) for shape in net.attention_shapes]
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(start < len(prompt) for start, prompt in zip(done, prompts, strict=True)):
        rows = [
            (row, done[row], min(len(prompt), done[row] + (chunk or longest)))
            for row, prompt in enumerate(prompts)
            if done[row] < len(prompt)
        ]
        rows.sort(key=lambda row: row[2] - row[1] > 1)  # one-token rows first
        batch = _batch(prompts, rows, table, block_size, caches, backends)
        hidden = net.forward(batch)
        start = 0
        for row, first, last in rows:
            logits[row].append(net.logits(hidden[start : start + last - first]))
            start += last - first
            done[row] = last
    return [torch.cat(parts) for parts in logits]


def _batch(
    prompts: list[list[int]],
    rows: list[tuple[int, int, int]],
    table: torch.Tensor,
    block_size: int,
    caches: list[torch.Tensor],
    backends: list[AttentionBackend],
) -> ForwardBatch:
    positions = [torch.arange(first, last) for _, first, last in rows]
    tokens = [torch.tensor(prompts[row][first:last]) for row, first, last in rows]
    slots = [
        table[row].long()[pos // block_size] * block_size + pos % block_size
        for (row, _, _), pos in zip(rows, positions, strict=True)
    ]
    query_lens = [last - first for _, first, last in rows]
    seq_lens = [last for _, _, last in rows]
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    metadata = AttentionMetadata(
        query_start=starts.int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=table[[row for row, _, _ in rows]],
        slot_mapping=torch.cat(slots),
        block_size=block_size,
        num_rows=len(rows),
        num_decode_rows=sum(n == 1 for n in query_lens),
        query_lens_cpu=query_lens,
        seq_lens_cpu=seq_lens,
    )
    for backend in backends:
        backend.plan(metadata)
    layers = [
        LayerKV(cache, backend, metadata) for cache, backend in zip(caches, backends, strict=True)
    ]
    return ForwardBatch(torch.cat(tokens), torch.cat(positions), layers)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
