# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Decode steps on a CPU as one call: what CUDA graphs are to a GPU.

Between the calls of a layer Python takes half as long as they do, its own code being pushed out of
the caches by the weights.
"""

from collections.abc import Callable

import numpy as np
import torch

from llmserve.attention.base import AttentionMetadata
from llmserve.kernels.cpu import Library, Recording
from llmserve.utils.logger import get_logger
from llmserve.worker.input_batch import StepInputs
from llmserve.worker.request_slots import RequestSlots

logger = get_logger(__name__)

MAX_ROWS = 32  # above, float32 products are torch's


class DecodeProgram:
    """Steps of one token a row, of up to `max_rows` rows, by the calls that `forward` made for so
    many once; `forward` turns inputs into hidden states."""

    def __init__(
        self,
        lib: Library,
        slots: RequestSlots,
        max_rows: int,
        forward: Callable[[StepInputs], torch.Tensor],
    ) -> None:
        self.max_rows = max_rows
        self._inputs = inputs = _inputs(slots, max_rows)
        self._recording = Recording(lib, lambda: forward(inputs))
        self.foreign = self._recording.foreign

    def holds(self, inputs: StepInputs) -> bool:
        """Whether it is such a step."""
        first = inputs.metadata[0]
        return first.num_rows == first.num_decode_rows <= self.max_rows

    def run(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states [num_tokens, hidden], which the next step overwrites."""
        static, rows = self._inputs, inputs.metadata[0].num_rows
        static.input_ids[:rows] = inputs.input_ids
        static.positions[:rows] = inputs.positions
        for to, group in zip(static.metadata, inputs.metadata, strict=True):
            to.seq_lens[:rows] = group.seq_lens
            to.slot_mapping[:rows] = group.slot_mapping
            to.block_table[:rows, : group.block_table.shape[1]] = group.block_table
        self._recording.run(rows)
        return self._recording.result[:rows]


def _inputs(slots: RequestSlots, rows: int) -> StepInputs:
    """Of the sink: one token at position 0 of block 0, in every row."""
    zeros, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int32)
    metadata = [
        AttentionMetadata(
            query_start=torch.arange(rows + 1, dtype=torch.int32),
            seq_lens=ones.clone(),
            block_table=torch.zeros(rows, table.shape[1], dtype=torch.int32),
            slot_mapping=zeros.clone(),
            block_size=size,
            num_rows=rows,
            num_decode_rows=rows,
            query_lens_cpu=[1] * rows,
            seq_lens_cpu=[1] * rows,
        )
        for table, size in zip(slots.tables, slots.block_sizes, strict=True)
    ]
    host = np.arange(rows)
    return StepInputs(zeros.clone(), zeros.clone(), zeros, zeros, metadata, host, host, host, host)
