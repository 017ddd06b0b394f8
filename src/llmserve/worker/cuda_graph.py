# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Whole decode steps as CUDA graphs: one copy to the device and one launch."""

from collections.abc import Callable

import numpy as np
import torch

from llmserve.attention.base import AttentionMetadata
from llmserve.core.scheduler_output import SchedulerOutput
from llmserve.worker.input_batch import InputBatcher, StepInputs

_MAX_ROWS = 512


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the graphs: padding a step to the next one costs at most an eighth above 32 rows."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, _MAX_ROWS + 1, 32)]
    most = min(max_num_seqs, _MAX_ROWS)
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """Steps in which every row runs one token, padded to the next captured number of rows.

    `forward` turns a step's inputs into its hidden states, and is the same function that runs such
    steps without a graph. Padding rows are slot 0 with no tokens; they write to block 0.
    """

    def __init__(
        self,
        batcher: InputBatcher,
        sizes: list[int],
        max_model_len: int,
        forward: Callable[[StepInputs], torch.Tensor],
    ) -> None:
        self._batcher = batcher
        self._slots = batcher.slots
        self._max_model_len = max_model_len
        self._forward = forward
        self._height = 4 + len(self._slots.block_sizes)
        self._packed = torch.zeros(
            self._height * sizes[-1], dtype=torch.int64, device=self._slots.device
        )
        self._starts = torch.arange(sizes[-1] + 1, dtype=torch.int32, device=self._slots.device)
        self._size_for = np.zeros(sizes[-1] + 1, np.int64)
        for size in reversed(sizes):
            self._size_for[: size + 1] = size
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, StepInputs, torch.Tensor]] = {}
        pool = None
        for size in reversed(sizes):  # the largest first: the smaller ones fit into its memory
            inputs = self._inputs(size)
            self._forward(inputs)  # compiles and loads what capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                inputs = self._inputs(size)
                hidden = self._forward(inputs)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, inputs, hidden)

    def fits(self, plan: SchedulerOutput) -> bool:
        """Whether the step is one of those captured."""
        rows = plan.num_rows
        return (
            rows < len(self._size_for)
            and plan.prompt_logprobs is None
            and plan.num_tokens == rows
            and bool(plan.sample.all())
        )

    def replay(self, plan: SchedulerOutput) -> tuple[StepInputs, torch.Tensor]:
        """The inputs, and hidden states [num_rows, hidden] that the next replay overwrites."""
        rows = plan.num_rows
        size = int(self._size_for[rows])
        packed = self._pack(plan, size)
        self._batcher.send_to(self._packed[: packed.size], packed)
        graph, static, hidden = self._graphs[size]
        graph.replay()
        draw_rows = np.arange(rows)
        inputs = StepInputs(
            static.input_ids, static.positions, static.logits_rows, static.last_slots[:rows],
            static.metadata, np.arange(rows + 1), draw_rows, plan.slots,
            plan.num_computed + 1 - self._slots.num_prompt_tokens[plan.slots],
        )  # fmt: skip
        return inputs, hidden[:rows]

    def _pack(self, plan: SchedulerOutput, size: int) -> np.ndarray:
        """int64 [height * size]: slot, token (-1: the slot's last), position, length, and where
        each group keeps the token."""
        rows, slots, at = plan.num_rows, plan.slots, plan.num_computed
        packed = np.zeros((self._height, size), np.int64)
        packed[0, :rows] = slots
        packed[1, :rows] = np.where(
            at < self._slots.num_tokens[slots], self._slots.tokens[slots, at], -1
        )
        packed[2, :rows] = at
        packed[3, :rows] = at + 1
        for row, table, block_size in zip(
            packed[4:], self._slots.tables, self._slots.block_sizes, strict=True
        ):
            block = table[slots, at // block_size].astype(np.int64)
            row[:rows] = block * block_size + at % block_size
        return packed.reshape(-1)

    def _inputs(self, size: int) -> StepInputs:
        """Views of the packed buffer, and what is computed from them on the device."""
        packed = self._packed[: self._height * size].view(self._height, size)
        slots, ids, positions, lengths = packed[:4]
        ids = torch.where(ids < 0, self._slots.last_token.index_select(0, slots), ids)
        seq_lens = lengths.int()
        metadata = [
            AttentionMetadata(
                query_start=self._starts[: size + 1],
                seq_lens=seq_lens,
                block_table=table.index_select(0, slots),
                slot_mapping=mapping,
                block_size=block_size,
                num_rows=size,
                num_decode_rows=size,
                max_query_len=1,
                max_seq_len=self._max_model_len,
                query_lens_cpu=[1] * size,
                seq_lens_cpu=[self._max_model_len] * size,
            )
            for table, mapping, block_size in zip(
                self._slots.device_tables, packed[4:], self._slots.block_sizes, strict=True
            )
        ]
        host = np.arange(size)
        return StepInputs(ids, positions, slots, slots, metadata, host, host, host, host)
