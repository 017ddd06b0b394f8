# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The table of what fits, for `llmserve plan` and for every start. Torch-free."""

import math
from collections.abc import Sequence

from llmserve.core.kv_spec import AnyKVSpec
from llmserve.core.messages import ModelInfo
from llmserve.kv_cache.groups import blocks_at_peak, page_bytes, plan_groups

_CONCURRENCIES = (1, 8, 64, 256)


def block_bytes(specs: Sequence[AnyKVSpec], block_size: int) -> int:
    """Bytes of one block of the pool, over all layers of a group."""
    groups = plan_groups(specs, block_size)
    return page_bytes(specs, block_size) * max(len(group.layers) for group in groups)


def gib(num_bytes: float) -> str:
    """`1.25 GiB`, `92.0 MiB`."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def contexts(max_model_len: int) -> list[int]:
    """The context lengths worth a row: powers of four up to the model's, and that."""
    return [n for n in (1024, 4096, 16384, 65536, 262144, 1048576) if n < max_model_len] + [
        max_model_len
    ]


def plan_table(
    *,
    model: str,
    dtype: str,
    weight_bytes: int,
    specs: Sequence[AnyKVSpec],
    block_size: int,
    num_blocks: int,
    max_model_len: int,
    max_num_batched_tokens: int,
) -> str:
    """Weights, KV per token, and the requests that fit at each context.

    `specs` by layer; `num_blocks` without the padding block. The requests at once are of that many
    tokens each, prompt and answer together, and share no prefix.
    """
    groups = plan_groups(specs, block_size)
    size = block_bytes(specs, block_size)

    def held(context: int) -> int:
        return sum(blocks_at_peak(group, context, max_num_batched_tokens) for group in groups)

    def longest(concurrency: int) -> int:
        low, high = 0, max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            fits = held(middle) * concurrency <= num_blocks
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    step = math.lcm(*(group.block_size for group in groups))
    growth = (held(max_model_len + step) - held(max_model_len)) * size / step
    lines = [
        f"{model} ({dtype})",
        f"  weights            {gib(weight_bytes)}",
        f"  KV cache           {gib(num_blocks * size)}: {num_blocks:,} blocks of {gib(size)}",
        f"  KV per token       {gib(growth)} (at {max_model_len:,} tokens)",
        f"  {'context':>12} {'KV a request':>14} {'requests at once':>18}",
    ]
    for context in contexts(max_model_len):
        need = held(context)
        lines.append(f"  {context:>12,} {gib(need * size):>14} {num_blocks // need:>18,}")
    lines.append(f"  {'at once':>12} {'longest context each':>24}")
    lines += [f"  {count:>12,} {longest(count):>24,}" for count in _CONCURRENCIES]
    return "\n".join(lines)


def started_table(info: ModelInfo) -> str:
    """The same table for an engine that is ready."""
    return plan_table(
        model=info.name, dtype=info.dtype, weight_bytes=info.weight_bytes, specs=info.kv_specs,
        block_size=info.block_size, num_blocks=info.num_kv_blocks,
        max_model_len=info.max_model_len, max_num_batched_tokens=info.max_num_batched_tokens,
    )  # fmt: skip
