# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The KV pool's memory, and each layer's view of it."""

import numpy as np
import torch

from llmserve.core.kv_spec import FullAttentionSpec, KVCacheConfig, MLASpec, SlidingWindowSpec


def allocate(
    kv_config: KVCacheConfig, dtype: torch.dtype, device: torch.device
) -> dict[int, torch.Tensor]:
    """Zeroed views by layer id, of one buffer [layer of a group][block][page].

    Attention layers: [num_blocks, 2, num_kv_heads, block_size, head_dim]; MLA: [num_blocks,
    block_size, latent_dim + rope_dim]. Layer i of every group lives in buffer i.
    """
    shape = (kv_config.num_layers_per_group, kv_config.num_blocks, kv_config.page_bytes)
    if device.type == "cpu":
        pool = torch.from_numpy(np.zeros(shape, np.uint8))  # pages cost nothing until written to
    else:
        pool = torch.zeros(shape, dtype=torch.uint8, device=device)
    views = {}
    for group in kv_config.groups:
        spec, size = group.spec, group.block_size
        if isinstance(spec, FullAttentionSpec | SlidingWindowSpec):
            page: tuple[int, ...] = (2, spec.num_kv_heads, size, spec.head_dim)
        elif isinstance(spec, MLASpec):
            page = (size, spec.latent_dim + spec.rope_dim)
        else:
            raise NotImplementedError(f"no tensors for {spec}")
        assert spec.page_bytes(size) == kv_config.page_bytes, (
            "a group's pages do not fill the pool's"
        )
        for index, layer in enumerate(group.layers):
            views[layer] = pool[index].view(dtype).view(kv_config.num_blocks, *page)
    return views
