# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The KV cache."""

from dataclasses import dataclass

from llmserve.config.flag import check_all, flag, fraction, positive, size


def _block_size(value: int) -> str | None:
    return None if value in (8, 16, 32, 64, 128) else "must be 8, 16, 32, 64 or 128"


@dataclass(frozen=True)
class CacheConfig:
    """KV cache size, blocks and reuse."""

    block_size: int = flag(16, "Tokens in one KV block.", check=_block_size)
    gpu_memory_utilization: float = flag(
        0.92, "Share of the card's memory that the process may use.", check=fraction
    )
    gpu_memory: int | None = flag(
        None, "The same as an absolute size, like 70GiB.", check=positive, parse=size
    )
    kv_cache_memory_bytes: int | None = flag(
        None,
        "Size of the KV cache itself, like 4GiB; overrides the two above.",
        check=positive,
        parse=size,
    )
    num_gpu_blocks_override: int | None = flag(
        None, "Number of KV blocks, for tests.", check=positive
    )
    kv_cache_dtype: str = flag("auto", "KV element type; auto is the model's.", choices=("auto",))
    enable_prefix_caching: bool = flag(True, "Reuse KV blocks of equal prefixes.")

    def __post_init__(self) -> None:
        check_all(self)
