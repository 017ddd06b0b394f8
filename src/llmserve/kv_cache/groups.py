# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How layers share one block pool: groups of equal layer counts and equal page bytes."""

from collections.abc import Sequence

from llmserve.core.kv_spec import (
    AnyKVSpec,
    KVCacheConfig,
    KVGroup,
    RecurrentStateSpec,
    SlidingWindowSpec,
)
from llmserve.errors import ConfigError


def plan_groups(specs: Sequence[AnyKVSpec], block_size: int) -> tuple[KVGroup, ...]:
    """Groups of layers with equal specs, none larger than a common layer count.

    That count is the one with the fewest padding layers plus groups (of equals, fewer padding
    layers). All pages are as large as the largest at `block_size` (a multiple of the largest
    attention page where a recurrent state is larger); the smaller ones take more tokens a block.
    """
    layers_of: dict[AnyKVSpec, list[int]] = {}
    for layer, spec in enumerate(specs):
        layers_of.setdefault(spec, []).append(layer)
    counts = [len(layers) for layers in layers_of.values()]

    def cost(size: int) -> tuple[int, int]:
        groups = [-(-count // size) for count in counts]
        padding = sum(groups) * size - sum(counts)
        return padding + sum(groups), padding

    size = min(range(1, max(counts) + 1), key=cost)
    page = page_bytes(specs, block_size)
    tokens: dict[AnyKVSpec, int] = {
        spec: block_size * (page // spec.page_bytes(block_size))
        for spec in layers_of
        if not isinstance(spec, RecurrentStateSpec)
    }
    checkpoint = max(tokens.values(), default=block_size)
    return tuple(
        KVGroup(spec, tuple(layers[i : i + size]), tokens.get(spec, checkpoint))
        for spec, layers in layers_of.items()
        for i in range(0, len(layers), size)
    )


def page_bytes(specs: Sequence[AnyKVSpec], block_size: int) -> int:
    """Bytes of every page of the pool."""
    states = [s.state_bytes for s in specs if isinstance(s, RecurrentStateSpec)]
    pages = [s.page_bytes(block_size) for s in specs if not isinstance(s, RecurrentStateSpec)]
    page = max(pages, default=1)
    return max(page, -(-max(states, default=0) // page) * page)


def reach(spec: AnyKVSpec) -> int | None:
    """How many tokens a query reads, itself included; None is all.

    A recurrent layer reads the state after the token before: like a window of two.
    """
    if isinstance(spec, SlidingWindowSpec):
        return spec.window
    return 2 if isinstance(spec, RecurrentStateSpec) else None


def blocks_at_peak(group: KVGroup, num_tokens: int, max_chunk: int) -> int:
    """Most blocks that a request of `num_tokens` holds at once in steps of `max_chunk` tokens."""
    blocks = -(-num_tokens // group.block_size)
    window = reach(group.spec)
    if window is None:
        return blocks
    return min(blocks, -(-(window - 1 + max_chunk) // group.block_size) + 1)


def make_kv_cache_config(
    specs: Sequence[AnyKVSpec],
    block_size: int,
    bytes_available: int,
    num_blocks_override: int | None = None,
    *,
    max_model_len: int = 1,
    max_num_batched_tokens: int = 1,
) -> KVCacheConfig:
    """The pool that fits `bytes_available`.

    ConfigError where one request of `max_model_len` tokens, computed `max_num_batched_tokens` at a
    time, does not fit it; where `num_blocks_override` asks for more than fits.
    """
    groups = plan_groups(specs, block_size)
    page = page_bytes(specs, block_size)
    num_layers = max(len(group.layers) for group in groups)
    bytes_available = max(bytes_available, 0)
    fits = bytes_available // (page * num_layers)
    num_blocks = fits if num_blocks_override is None else num_blocks_override
    needed = 1 + sum(blocks_at_peak(g, max_model_len, max_num_batched_tokens) for g in groups)
    size = f"{page * num_layers / 2**20:.2f} MiB a block of {block_size} tokens"
    if num_blocks > fits:
        raise ConfigError(
            f"--num-gpu-blocks-override {num_blocks} needs more than the "
            f"{bytes_available / 2**30:.2f} GiB there are for the KV cache ({size}: {fits} fit)"
        )
    if num_blocks < needed:
        room = f"{num_blocks} blocks fit in {bytes_available / 2**30:.2f} GiB"
        if num_blocks_override is not None:
            room = f"--num-gpu-blocks-override allows {num_blocks}"
        raise ConfigError(
            f"one request of --max-model-len {max_model_len} tokens needs {needed} KV blocks, but "
            f"{room} ({size}); lower --max-model-len or give the KV cache more memory"
        )
    return KVCacheConfig(num_blocks, page, num_layers, groups)


def tokens_that_fit(kv_config: KVCacheConfig, max_model_len: int) -> int:
    """Tokens of requests of `max_model_len` that fit at once; over that length, requests."""
    each = sum(blocks_at_peak(group, max_model_len, 1) for group in kv_config.groups)
    return (kv_config.num_blocks - 1) * max_model_len // each
