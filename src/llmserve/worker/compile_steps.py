# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Compiles the Triton kernels of a model's steps for a card that need not be there.

The model itself runs its steps over the meta device, so the kernels are those that a start would
launch, whatever the family; only the draw, which starts from real logits, is called here.
"""

import os
import sys

import torch

from llmserve.attention.base import AttentionMetadata
from llmserve.attention.triton_paged import TritonPagedAttention
from llmserve.config.hf import ModelDescription
from llmserve.errors import ConfigError
from llmserve.kernels.compilations import compilations
from llmserve.kernels.compile_only import Compiled, compile_only
from llmserve.kernels.draw import draw_rows_triton
from llmserve.kernels.penalties import penalize_triton
from llmserve.kernels.token_mask import mask_logits_triton
from llmserve.kernels.top_logprobs import top_logprobs_triton
from llmserve.kernels.triton_jit import Card
from llmserve.kv_cache.groups import plan_groups
from llmserve.layers.base import Build, Layer
from llmserve.layers.forward_batch import ForwardBatch, LayerKV
from llmserve.models.interfaces import CausalLM
from llmserve.models.registry import MODELS
from llmserve.quantization.registry import QUANTIZATIONS
from llmserve.utils.child import receive_start
from llmserve.worker.compile_ahead import CompileStart
from llmserve.worker.worker import DTYPES, launch_sizes

_META = torch.device("meta")
# Multiprocessors of the largest server card of each architecture: A100, L40S, H100 and H200, B200,
# RTX PRO 6000. They decide into how many parts attention is split, and the table of tiles.
_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
_GRAPH_TOKENS = (16, 32, 64, 128, 256, 512)  # of mixed steps: beyond, launches are the same


def parse_cards(text: str) -> list[Card]:
    """`sm_90,sm_120`. ConfigError names what is known."""
    cards = []
    for name in text.split(","):
        arch = name.strip().removeprefix("sm_")
        if not arch.isdecimal() or int(arch) not in _MULTIPROCESSORS:
            known = ", ".join(f"sm_{arch}" for arch in _MULTIPROCESSORS)
            raise ConfigError(f"--card {name.strip()!r} is not known (known: {known})")
        cards.append(Card(f"sm_{arch}", int(arch), _MULTIPROCESSORS[int(arch)]))
    return cards


def compile_steps(
    description: ModelDescription,
    dtype: torch.dtype,
    card: Card,
    *,
    max_rows: int,
    max_model_len: int,
    block_size: int,
    part: tuple[int, int] = (0, 1),
) -> list[Compiled]:
    """What a start with own attention launches, one entry a launch; of `part` alone, as
    compile_only has it."""
    build = Build(dtype, _META, QUANTIZATIONS.load("unquantized"), max_model_len)
    model: CausalLM = MODELS.load(description.architecture)(description, build)
    for module in model.modules():
        if isinstance(module, Layer):
            module.finalize()
    with compile_only(card, part) as done, torch.inference_mode():
        for counts in ([1], *launch_sizes(max_rows, max_model_len)):
            _step(model, dtype, counts, None, max_model_len, block_size)
        for tokens in _GRAPH_TOKENS:
            _step(model, dtype, [tokens], max_rows, max_model_len, block_size)
        _draw(model.logits_width)
    return done


def _empty(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device=_META)


def _step(
    model: CausalLM,
    dtype: torch.dtype,
    counts: list[int],
    graph_rows: int | None,
    max_model_len: int,
    block_size: int,
) -> None:
    """One forward of rows of `counts` tokens; with `graph_rows`, as a graph of mixed steps has it:
    of that many rows at most, whose numbers are read on the device."""
    rows, tokens = graph_rows or len(counts), sum(counts)
    decodes = min(rows, tokens) if graph_rows else sum(count == 1 for count in counts)
    layers: dict[int, LayerKV] = {}
    for group in plan_groups(model.kv_specs, block_size):
        blocks = -(-max_model_len // group.block_size)
        metadata = AttentionMetadata(
            query_start=_empty(rows + 1, dtype=torch.int32),
            seq_lens=_empty(rows, dtype=torch.int32),
            block_table=_empty(rows, blocks, dtype=torch.int32),
            slot_mapping=_empty(tokens),
            block_size=group.block_size,
            num_rows=rows,
            num_decode_rows=decodes,
            query_lens_cpu=counts,
            seq_lens_cpu=counts,
            row_counts=_empty(2, dtype=torch.int32) if graph_rows else None,
        )
        for layer in group.layers:
            shape = model.attention_shapes[layer]
            cache = _empty(2, 2, shape.num_kv_heads, group.block_size, shape.head_dim, dtype=dtype)
            backend = TritonPagedAttention(shape, dtype, _META)
            backend.plan(metadata)
            layers[layer] = LayerKV(cache, backend, metadata)
    batch = ForwardBatch(_empty(tokens), _empty(tokens), [layers[i] for i in range(len(layers))])
    model.forward(batch)


def _draw(width: int) -> None:
    rows = 2
    logits = _empty(rows, width, dtype=torch.float32)
    params = _empty(rows, 4, dtype=torch.float32)
    slots, arrived = _empty(rows), _empty(rows, dtype=torch.int32)
    for random, truncated in ((False, False), (True, False), (True, True)):
        draw_rows_triton(
            logits, slots, params, slots, slots, arrived, random=random, truncated=truncated
        )
    mask_logits_triton(logits, _empty(rows, -(-width // 32), dtype=torch.int32))
    penalize_triton(
        logits, _empty(rows, width, dtype=torch.int32), slots,
        _empty(rows, 3, dtype=torch.float32),
    )  # fmt: skip
    top_logprobs_triton(logits, slots, 2)


def compile_part(start: CompileStart) -> None:
    """A process's part; what it has compiled goes to `report_fd`, into a pipe that holds 64 KiB."""
    compilations().watch()
    with open(start.report_fd, "w") as report:
        try:
            compile_steps(
                start.description, DTYPES[start.dtype], start.card, max_rows=start.max_rows,
                max_model_len=start.max_model_len, block_size=start.block_size, part=start.part,
            )  # fmt: skip
        finally:
            report.write("\n".join(compilations().compiled))


if __name__ == "__main__":
    compile_part(receive_start(int(sys.argv[1]), CompileStart))
    os._exit(0)
