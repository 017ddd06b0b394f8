# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the layers of a model keep in the KV cache, and how blocks are laid out for them."""

import msgspec


class KVSpec(msgspec.Struct, frozen=True, tag=True):
    """What one layer keeps."""

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens."""
        raise NotImplementedError


class FullAttentionSpec(KVSpec, frozen=True, tag="full"):
    """Keys and values of every token: [2][num_kv_heads][block_size][head_dim]."""

    num_kv_heads: int
    head_dim: int
    dtype_bytes: int

    def page_bytes(self, block_size: int) -> int:
        return 2 * self.num_kv_heads * block_size * self.head_dim * self.dtype_bytes


class SlidingWindowSpec(KVSpec, frozen=True, tag="window"):
    """Like full attention, but only the last `window` tokens (the query's own too) are read."""

    num_kv_heads: int
    head_dim: int
    dtype_bytes: int
    window: int

    def page_bytes(self, block_size: int) -> int:
        return 2 * self.num_kv_heads * block_size * self.head_dim * self.dtype_bytes


class MLASpec(KVSpec, frozen=True, tag="mla"):
    """One latent vector a token, shared by all heads: [block_size][latent_dim + rope_dim]."""

    latent_dim: int
    rope_dim: int
    dtype_bytes: int

    def page_bytes(self, block_size: int) -> int:
        return block_size * (self.latent_dim + self.rope_dim) * self.dtype_bytes


class RecurrentStateSpec(KVSpec, frozen=True, tag="recurrent"):
    """A state of fixed size a request, whatever its length; checkpoints every block."""

    state_bytes: int

    def page_bytes(self, block_size: int) -> int:
        return self.state_bytes


AnyKVSpec = FullAttentionSpec | SlidingWindowSpec | MLASpec | RecurrentStateSpec


class KVGroup(msgspec.Struct, frozen=True):
    """Layers that share block tables: position p is in block p // block_size of a request."""

    spec: AnyKVSpec
    layers: tuple[int, ...]  # layer ids; at most KVCacheConfig.num_layers_per_group
    block_size: int


class KVCacheConfig(msgspec.Struct, frozen=True):
    """One pool of `num_blocks` blocks for all groups.

    A block of a group spans the group's layers: layer i of a group lives in buffer i, and buffer i
    is [num_blocks][page_bytes]. So a block id means the same bytes whichever group owns it. Block 0
    is the padding sink.
    """

    num_blocks: int
    page_bytes: int
    num_layers_per_group: int
    groups: tuple[KVGroup, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.page_bytes * self.num_layers_per_group
