# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""InputBatcher against the same arrays written token by token."""

import numpy as np
import torch

from llmserve.core.kv_spec import FullAttentionSpec, KVCacheConfig, KVGroup
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest, SchedulerOutput
from llmserve.worker.input_batch import InputBatcher
from llmserve.worker.request_slots import RequestSlots


def test_equals_token_by_token() -> None:
    """Random rows: decodes past the host's tokens, drafts, chunks that end early or sample."""
    rng = np.random.default_rng()
    spec = FullAttentionSpec(1, 8, 4)
    groups = (KVGroup(spec, (0,), 8), KVGroup(spec, (1,), 16))
    slots = RequestSlots(9, 120, KVCacheConfig(99, 1, 1, groups), torch.device("cpu"))
    for slot in range(1, 9):
        length = int(rng.integers(20, 60))
        prompt = rng.integers(1000, 2000, length).astype(np.int32)
        blocks = [rng.permutation(np.arange(1, 99))[: 100 // size].tolist() for size in (8, 16)]
        slots.apply(
            [NewRequest(slot, prompt, 15, 0, SamplingParams(), blocks)], np.empty((0, 4), np.int32)
        )
    slots.last_token.copy_(torch.arange(9) + 3000)
    drafts = rng.integers(4000, 5000, (9, 3)).astype(np.int32)

    rows = rng.permutation(np.arange(1, 9))
    known = slots.num_tokens[rows]
    computed = np.array([known[0], known[1] + 3, known[2] - 1, known[3], known[4] - 9,
                         known[5] - 12, 0, 2])  # fmt: skip
    num_drafts = np.array([0, 0, 0, 3, 0, 0, 0, 0])
    count = np.array([1, 1, 1, 4, 9, 5, known[6], 10])
    sample = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    plan = SchedulerOutput(
        1, rows.astype(np.int32), computed.astype(np.int32), count.astype(np.int32),
        num_drafts.astype(np.int32), sample, np.empty((0, 4), np.int32),
    )  # fmt: skip
    inputs = InputBatcher(slots).build(plan, drafts)

    ids, positions, draws, draw_slots, draw_index = [], [], [], [], []
    mappings: list[list[int]] = [[], []]
    for row, slot in enumerate(rows.tolist()):
        for i in range(count[row]):
            position = int(computed[row]) + i
            draft = i - (count[row] - num_drafts[row])
            if draft >= 0:
                ids.append(int(drafts[slot, draft]))
            elif position < known[row]:
                ids.append(int(slots.tokens[slot, position]))
            else:
                ids.append(3000 + slot)
            for g, size in enumerate((8, 16)):
                block = int(slots.tables[g][slot, position // size])
                mappings[g].append(block * size + position % size)
            if sample[row] and i >= count[row] - 1 - num_drafts[row]:
                draws.append(len(positions))
                draw_slots.append(slot)
                draw_index.append(position + 1 - 15)
            positions.append(position)
    assert inputs.input_ids.tolist() == ids
    assert inputs.positions.tolist() == positions
    assert inputs.logits_rows.tolist() == draws
    assert inputs.last_slots.tolist() == inputs.draw_slots.tolist() == draw_slots
    assert inputs.draw_index.tolist() == draw_index
    for g, metadata in enumerate(inputs.metadata):
        assert metadata.slot_mapping.tolist() == mappings[g]
        assert metadata.query_start.tolist() == [0, *np.cumsum(count).tolist()]
        assert metadata.seq_lens.tolist() == metadata.seq_lens_cpu == (computed + count).tolist()
        assert metadata.query_lens_cpu == count.tolist()
        assert (metadata.num_rows, metadata.num_decode_rows) == (8, 3)
        width = metadata.block_table.shape[1]
        assert width * metadata.block_size >= max(computed + count)
        assert metadata.block_table.tolist() == slots.tables[g][rows, :width].tolist()
