# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the worker keeps of each request between steps. Slot 0 is the sink for padding."""

import numpy as np
import torch

from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.scheduler_output import NewRequest


class RequestSlots:
    """Host arrays by slot, and on the device what the next step needs before the host knows it.

    `tokens` int32 [num_slots, max_model_len] holds what the scheduler sent (and, with speculation,
    what was drawn since); `num_tokens` counts them. `last_token` int64 [num_slots] on the device is
    what each slot drew last. `tables[g]` int32 [num_slots, blocks] are KV group g's block tables;
    `device_tables` the same on the device (on the CPU the same memory).
    """

    def __init__(
        self, num_slots: int, max_model_len: int, kv_config: KVCacheConfig, device: torch.device
    ) -> None:
        self.device = device
        self.tokens = np.zeros((num_slots, max_model_len), np.int32)
        self.num_tokens = np.zeros(num_slots, np.int32)
        self.num_prompt_tokens = np.zeros(num_slots, np.int32)
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.block_sizes = [group.block_size for group in kv_config.groups]
        widths = [-(-max_model_len // size) for size in self.block_sizes]
        starts = np.cumsum([0, *(num_slots * width for width in widths)])
        flat = np.zeros(starts[-1], np.int32)
        self._flat_device = torch.from_numpy(flat).to(device)
        self.tables = []
        self.device_tables = []
        for low, high, width in zip(starts[:-1], starts[1:], widths, strict=True):
            self.tables.append(flat[low:high].reshape(num_slots, width))
            self.device_tables.append(self._flat_device[low:high].view(num_slots, width))
        self._flat = flat
        self._starts = starts[:-1]
        self._widths = np.array(widths)

    def add(self, request: NewRequest) -> None:
        """A request enters its slot; the device's tables follow with `apply`."""
        slot, count = request.slot, len(request.token_ids)
        self.tokens[slot, :count] = request.token_ids
        self.num_tokens[slot] = count
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        for table, blocks in zip(self.tables, request.blocks, strict=True):
            table[slot, : len(blocks)] = blocks

    def apply(self, new_requests: list[NewRequest], new_blocks: np.ndarray) -> None:
        """Enters the requests and `new_blocks` int32 [n, 4] (slot, group, index, block id)."""
        changed = []
        for request in new_requests:
            self.add(request)
            for group, blocks in enumerate(request.blocks):
                start = self._starts[group] + request.slot * self._widths[group]
                changed.append(np.arange(start, start + len(blocks)))
        if len(new_blocks):
            slot, group, index, block = new_blocks.T.astype(np.int64)
            at = self._starts[group] + slot * self._widths[group] + index
            self._flat[at] = block
            changed.append(at)
        if changed and self.device.type != "cpu":
            at = np.concatenate(changed)
            packed = torch.from_numpy(np.stack((at, self._flat[at]))).pin_memory()
            packed = packed.to(self.device, non_blocking=True)
            self._flat_device.index_copy_(0, packed[0], packed[1].int())
