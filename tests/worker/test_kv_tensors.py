# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Layers' views of the pool."""

import torch

from llmserve.core.kv_spec import FullAttentionSpec, KVCacheConfig, KVGroup, SlidingWindowSpec
from llmserve.worker.kv_tensors import allocate


def test_layout() -> None:
    """Layer i of each group is buffer i; a block is the same bytes for every group."""
    full = FullAttentionSpec(2, 8, 4)
    window = SlidingWindowSpec(1, 8, 4, 20)  # half the page: twice the tokens
    page = full.page_bytes(16)
    groups = (KVGroup(full, (0, 2), 16), KVGroup(window, (1, 3), 32))
    views = allocate(KVCacheConfig(5, page, 2, groups), torch.float32, torch.device("cpu"))
    assert views[0].shape == views[2].shape == (5, 2, 2, 16, 8)
    assert views[1].shape == views[3].shape == (5, 2, 1, 32, 8)
    assert all(view.is_contiguous() and not view.any() for view in views.values())
    assert views[0].data_ptr() == views[1].data_ptr() and views[2].data_ptr() == views[3].data_ptr()
    views[3][4] = 7
    assert (views[2][4] == 7).all() and not views[2][:4].any() and not views[0].any()
