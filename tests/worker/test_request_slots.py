# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What slots hold after requests and blocks have come."""

import numpy as np
import torch

from llmserve.core.kv_spec import FullAttentionSpec, KVCacheConfig, KVGroup, SlidingWindowSpec
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest
from llmserve.worker.request_slots import RequestSlots


def test_apply() -> None:
    full, window = FullAttentionSpec(1, 8, 4), SlidingWindowSpec(1, 4, 4, 20)
    groups = (KVGroup(full, (0,), 16), KVGroup(window, (1,), 32))
    config = KVCacheConfig(50, full.page_bytes(16), 1, groups)
    slots = RequestSlots(4, 100, config, torch.device("cpu"))
    tokens = np.arange(40, dtype=np.int32)
    request = NewRequest(3, tokens, 30, 0, SamplingParams(), [[7, 8, 9], [5, 6]])
    slots.apply([request], np.array([[3, 0, 3, 10], [3, 1, 2, 11], [1, 1, 0, 12]], np.int32))
    assert slots.tokens[3, :40].tolist() == tokens.tolist()
    assert slots.num_tokens.tolist() == [0, 0, 0, 40]
    assert slots.num_prompt_tokens[3] == 30
    assert slots.tables[0][3].tolist() == [7, 8, 9, 10, 0, 0, 0]
    assert slots.tables[1][3].tolist() == [5, 6, 11, 0]
    assert slots.tables[1][1].tolist() == [12, 0, 0, 0]
    for host, device in zip(slots.tables, slots.device_tables, strict=True):
        assert device.tolist() == host.tolist()
