# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Whole steps as CUDA graphs: one copy to the device and one launch, and one more for the draw."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from llmserve.attention.base import AttentionMetadata
from llmserve.config.device import DeviceConfig
from llmserve.core.scheduler_output import SchedulerOutput
from llmserve.worker.input_batch import HostStep, InputBatcher, StepInputs
from llmserve.worker.mask_gate import MaskGate

_MAX_ROWS = 512
_MAX_TOKENS = 2048  # of a step with prompts: above, the device is slower than its launches
MAX_WHOLE = 512  # of these under FULL_AND_PIECEWISE: above, FlashInfer's prefill is worth launches


def decode_sizes(config: DeviceConfig, max_num_seqs: int) -> list[int]:
    """Rows of the graphs: padding a step to the next one costs at most an eighth above 32 rows."""
    most = min(max_num_seqs, config.max_cudagraph_capture_size or _MAX_ROWS)
    if config.cudagraph_capture_sizes:
        return sorted({size for size in config.cudagraph_capture_sizes if size <= most})
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), *range(288, most, 32)]
    return [size for size in sizes if size < most] + [most]


def mixed_sizes(config: DeviceConfig, max_num_batched_tokens: int) -> list[int]:
    """Tokens of the graphs of steps with prompts in them."""
    if config.cudagraph_mode == "FULL_DECODE_ONLY":
        return []
    few = [1, 2, 4, 8] if config.cudagraph_mode == "PIECEWISE" else []
    coarse = [384, 512, 640, 768, 1024, 1280, 1536, 1792, _MAX_TOKENS]
    sizes = [*few, 16, 32, 64, 96, 128, 192, 256, *coarse]
    most = min(max_num_batched_tokens, _MAX_TOKENS)
    return [size for size in sizes if size < most] + [most]


@dataclass(slots=True)
class _Graph:
    """A captured forward. `draws` by whether any row is random and whether there is a mask: what
    it drew, int64 [2, rows]."""

    graph: torch.cuda.CUDAGraph
    inputs: StepInputs
    hidden: torch.Tensor  # [num_tokens, hidden], overwritten by the next replay
    draws: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = field(
        default_factory=dict
    )


def record(
    run: Callable[[], torch.Tensor],
    pool: tuple[int, int],
    breaks: list[Callable[[], None]] | None = None,
) -> tuple[list[torch.cuda.CUDAGraph], torch.Tensor]:
    """Captures `run`; where it calls what then is in `breaks`, a graph ends and another begins.

    Without torch.cuda.graph, which empties the allocator's cache before each of hundreds.
    """
    graphs: list[torch.cuda.CUDAGraph] = []

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool)  # type: ignore[arg-type]

    def split() -> None:
        graphs[-1].capture_end()
        begin()

    torch.cuda.synchronize()
    with torch.cuda.stream(_capture_stream()):
        begin()
        try:
            if breaks is not None:
                breaks.append(split)
            result = run()
        finally:
            graphs[-1].capture_end()
            if breaks is not None:
                breaks.clear()
    return graphs, result


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all: memory of a pool is reused by its stream alone."""
    return torch.cuda.Stream()


class StepGraphs:
    """Steps of one token a row, padded to the next captured number of rows; and, with `mixed`
    sizes, steps with prompts of up to `max_rows` rows, padded to the next number of tokens.

    `forward` turns a step's inputs into its hidden states, and is the same function that runs such
    steps without a graph; `draw` turns hidden states, slots, output indices, whether any row is
    random and, but for None, the words of a mask, int32 [rows, num_words], into token ids and
    whether each is invalid, int64 [2, rows]. Padding rows are slot 0 with no tokens, padding tokens
    of no row; both write to block 0.
    """

    def __init__(
        self,
        batcher: InputBatcher,
        sizes: list[int],
        mixed: list[int],
        max_rows: int,
        max_model_len: int,
        pool: tuple[int, int],
        forward: Callable[[StepInputs], torch.Tensor],
        draw: Callable[
            [torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor | None], torch.Tensor
        ],
        num_words: int,
    ) -> None:
        self._batcher = batcher
        self._slots = batcher.slots
        self._max_model_len = max_model_len
        self._max_rows = max_rows
        groups = len(self._slots.block_sizes)
        self._height = 5 + groups
        most = max([self._height * sizes[-1], *(self._mixed_width(size) for size in mixed)])
        self._packed = torch.zeros(most, dtype=torch.int64, device=self._slots.device)
        self.gate = MaskGate(sizes[-1], num_words, self._slots.device)
        self._starts = torch.arange(sizes[-1] + 1, dtype=torch.int32, device=self._slots.device)
        self._pool = pool
        self._decode: dict[int, _Graph] = {}
        self._mixed: dict[int, _Graph] = {}
        # The largest first: the smaller ones fit into its memory
        for size in reversed(mixed):
            self._mixed[size] = self._capture(self._mixed_inputs, size, forward)
        for size in reversed(sizes):
            made = self._capture(self._decode_inputs, size, forward)
            self._decode[size] = made
            index = self._packed[4 * size : 5 * size]
            for random, mask in ((False, None), (True, None), (True, self.gate.on_device[:size])):
                inputs = (made.hidden, made.inputs.last_slots, index, random, mask)
                made.draws[random, mask is not None] = self._record(
                    functools.partial(draw, *inputs)
                )
        self._decode_size = rounded(sizes)
        self._mixed_size = rounded(mixed)

    def _capture(
        self,
        inputs: Callable[[int], StepInputs],
        size: int,
        forward: Callable[[StepInputs], torch.Tensor],
    ) -> _Graph:
        made = []

        def run() -> torch.Tensor:
            made.append(inputs(size))
            return forward(made[-1])

        graph, hidden = self._record(run)
        return _Graph(graph, made[-1], hidden)

    def _record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        run()  # compiles and loads what capture must not
        (graph,), result = record(run, self._pool)
        return graph, result

    def replay(self, plan: SchedulerOutput) -> tuple[StepInputs, torch.Tensor] | None:
        """The inputs, and hidden states that the next replay overwrites, those of padding behind
        them; None if no graph holds such a step."""
        rows, tokens = plan.num_rows, plan.num_tokens
        if plan.prompt_logprobs is not None:
            return None
        if tokens == rows and rows < len(self._decode_size) and plan.sample.all():
            return self._replay_decode(plan)
        if tokens < len(self._mixed_size) and rows <= self._max_rows and not plan.num_drafts.any():
            return self._replay_mixed(self._batcher.read(plan))
        return None

    def draw(self, inputs: StepInputs, random: bool, mask: int | None) -> torch.Tensor:
        """Draws a token for every row of the decode step just replayed, under mask number `mask` of
        `gate` if there is one: int64 [2, rows], which the next draw overwrites."""
        rows, masked = len(inputs.draw_rows), mask is not None
        if mask is not None:
            self.gate.enqueue(rows, mask)
            random = True  # of masked draws there is one graph, which draws greedy rows as well
        graph, drawn = self._decode[int(self._decode_size[rows])].draws[random, masked]
        graph.replay()
        return drawn[:, :rows]

    def _replay_decode(self, plan: SchedulerOutput) -> tuple[StepInputs, torch.Tensor]:
        rows, slots, at = plan.num_rows, plan.slots, plan.num_computed
        size = int(self._decode_size[rows])
        index = at + 1 - self._slots.num_prompt_tokens[slots]
        packed = np.zeros((self._height, size), np.int64)
        packed[0, :rows] = slots
        packed[1, :rows] = np.where(
            at < self._slots.num_tokens[slots], self._slots.tokens[slots, at], -1
        )
        packed[2, :rows] = at
        packed[3, :rows] = at + 1
        packed[4, :rows] = index
        for row, table, block_size in zip(
            packed[5:], self._slots.tables, self._slots.block_sizes, strict=True
        ):
            block = table[slots, at // block_size].astype(np.int64)
            row[:rows] = block * block_size + at % block_size
        self._batcher.ring.send(self._packed[: packed.size], packed)
        made = self._decode[size]
        made.graph.replay()
        static = made.inputs
        inputs = StepInputs(
            static.input_ids, static.positions, static.logits_rows, static.last_slots[:rows],
            static.metadata, np.arange(rows + 1), np.arange(rows), slots, index, decodes=True,
        )  # fmt: skip
        return inputs, made.hidden

    def _replay_mixed(self, host: HostStep) -> tuple[StepInputs, torch.Tensor]:
        rows, tokens = len(host.slots), len(host.ids)
        size, most = int(self._mixed_size[tokens]), self._max_rows
        packed = np.zeros(self._mixed_width(size), np.int64)
        host.ids[host.unknown] = -1
        by_token = packed[: (3 + len(host.mappings)) * size].reshape(-1, size)
        for row, values in zip(
            by_token, (host.ids, host.positions, host.token_slots, *host.mappings), strict=True
        ):
            row[:tokens] = values
        by_row = packed[by_token.size : -most - 3].reshape(-1, most)
        for row, values in zip(
            by_row, (host.slots, host.lengths, host.logits_rows, host.draw_slots), strict=True
        ):
            row[: len(values)] = values
        starts = packed[-most - 3 : -2]
        starts[:] = tokens
        starts[:rows] = host.starts[:-1]
        packed[-2:] = host.num_decode_rows, rows
        self._batcher.ring.send(self._packed[: packed.size], packed)
        made = self._mixed[size]
        made.graph.replay()
        static, draws = made.inputs, len(host.draw_rows)
        inputs = StepInputs(
            static.input_ids, static.positions, static.logits_rows[:draws],
            static.last_slots[:draws], static.metadata, host.starts, host.draw_rows,
            host.draw_slots.astype(np.int32), host.draw_index,
        )  # fmt: skip
        return inputs, made.hidden

    def _decode_inputs(self, size: int) -> StepInputs:
        """Views of the packed buffer, and what is computed from them on the device."""
        packed = self._packed[: self._height * size].view(self._height, size)
        slots, ids, positions, lengths = packed[:4]
        ids = torch.where(ids < 0, self._slots.last_token.index_select(0, slots), ids)
        host = np.arange(size)
        metadata = self._metadata(self._starts[: size + 1], lengths, slots, packed[5:], size, 1)
        return StepInputs(ids, positions, slots, slots, metadata, host, host, host, host)

    def _mixed_width(self, size: int) -> int:
        return (3 + len(self._slots.block_sizes)) * size + 5 * self._max_rows + 3

    def _mixed_inputs(self, size: int) -> StepInputs:
        packed, rows = self._packed[: self._mixed_width(size)], self._max_rows
        by_token = packed[: (3 + len(self._slots.block_sizes)) * size].view(-1, size)
        by_row = packed[by_token.numel() : -rows - 3].view(-1, rows)
        ids, positions, token_slots = by_token[:3]
        ids = torch.where(ids < 0, self._slots.last_token.index_select(0, token_slots), ids)
        slots, lengths, logits_rows, last_slots = by_row
        starts, counts = packed[-rows - 3 : -2].int(), packed[-2:].int()
        metadata = self._metadata(starts, lengths, slots, by_token[3:], size, size)
        for of_group in metadata:
            of_group.row_counts = counts
        host = np.arange(rows)
        return StepInputs(ids, positions, logits_rows, last_slots, metadata, host, host, host, host)

    def _metadata(
        self,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        mappings: torch.Tensor,
        num_tokens: int,
        query_len: int,
    ) -> list[AttentionMetadata]:
        seq_lens, rows = lengths.int(), len(slots)
        return [
            AttentionMetadata(
                query_start=starts,
                seq_lens=seq_lens,
                block_table=table.index_select(0, slots),
                slot_mapping=mapping,
                block_size=block_size,
                num_rows=rows,
                num_decode_rows=min(rows, num_tokens),
                query_lens_cpu=[query_len] * rows,
                seq_lens_cpu=[self._max_model_len] * rows,
            )
            for table, mapping, block_size in zip(
                self._slots.device_tables, mappings, self._slots.block_sizes, strict=True
            )
        ]


def rounded(sizes: list[int]) -> np.ndarray:
    """int64 [sizes[-1] + 1]: the captured size for each number."""
    rounded = np.zeros(sizes[-1] + 1 if sizes else 0, np.int64)
    for size in reversed(sizes):
        rounded[: size + 1] = size
    return rounded
