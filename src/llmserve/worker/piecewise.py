# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Steps as CUDA graphs with attention between them: what lies between the layers' attention does
not depend on how the tokens are spread over rows, so any backend and any step will do."""

from collections.abc import Callable

import torch

from llmserve.attention.base import AttentionBackend, AttentionMetadata, AttentionShape
from llmserve.layers.forward_batch import ForwardBatch, LayerKV
from llmserve.worker.cuda_graph import record, rounded
from llmserve.worker.input_batch import InputBatcher, StepInputs


class PieceGraphs:
    """Steps of up to `sizes[-1]` tokens, padded to the next captured number.

    `layers` are (cache, backend, KV group) by layer id; `forward` gives a batch's hidden states.
    Padding tokens are written to block 0. All layers and sizes share the buffers that lead into
    attention and out of it.
    """

    def __init__(
        self,
        batcher: InputBatcher,
        layers: list[tuple[torch.Tensor, AttentionBackend, int]],
        sizes: list[int],
        pool: tuple[int, int],
        forward: Callable[[ForwardBatch], torch.Tensor],
    ) -> None:
        self._batcher = batcher
        self._layers = layers
        groups = len(batcher.slots.block_sizes)
        # Rows: ids, positions, where each group's K and V go
        self._inputs = torch.zeros(
            2 + groups, sizes[-1], dtype=torch.int64, device=batcher.slots.device
        )
        self._buffers: dict[AttentionShape, torch.Tensor] = {}
        self._pieces: dict[int, tuple[list[torch.cuda.CUDAGraph], torch.Tensor]] = {}
        for size in reversed(sizes):  # the smaller ones fit into the memory of the largest
            self._pieces[size] = self._capture(size, pool, forward)
        self._size = rounded(sizes)

    def _capture(
        self, size: int, pool: tuple[int, int], forward: Callable[[ForwardBatch], torch.Tensor]
    ) -> tuple[list[torch.cuda.CUDAGraph], torch.Tensor]:
        ids, positions, *mappings = self._inputs[:, :size]
        breaks: list[Callable[[], None]] = []
        layers = [
            LayerKV(cache, _Break(backend, self._buffer(backend)[:, :size], breaks), _at(mapping))
            for cache, backend, group in self._layers
            for mapping in [mappings[group]]
        ]

        def run() -> torch.Tensor:
            return forward(ForwardBatch(ids, positions, layers))

        run()  # compiles and loads what capture must not
        return record(run, pool, breaks)

    def _buffer(self, backend: AttentionBackend) -> torch.Tensor:
        """[2, most tokens, num_heads, head_dim]: queries, and what attention makes of them."""
        shape = backend.shape
        if shape not in self._buffers:
            self._buffers[shape] = torch.zeros(
                2, self._inputs.shape[1], shape.num_heads, shape.head_dim,
                dtype=backend.dtype, device=backend.device,
            )  # fmt: skip
        return self._buffers[shape]

    def replay(self, inputs: StepInputs) -> torch.Tensor | None:
        """Hidden states that the next replay overwrites, those of padding behind them; None if the
        step is larger than any graph. The backends have planned it."""
        tokens = len(inputs.input_ids)
        if tokens >= len(self._size):
            return None
        size = int(self._size[tokens])
        of_tokens = [inputs.input_ids, inputs.positions]
        of_tokens += [metadata.slot_mapping for metadata in inputs.metadata]
        static = self._inputs[:, :size]
        static[2:, tokens:].zero_()
        for row, values in zip(static, of_tokens, strict=True):
            row[:tokens].copy_(values)
        (first, *others), hidden = self._pieces[size]
        first.replay()
        for (cache, backend, group), graph in zip(self._layers, others, strict=True):
            query, out = self._buffers[backend.shape][:, :tokens]
            out.copy_(backend.forward(query, cache, inputs.metadata[group]))
            graph.replay()
        return hidden


class _Break(AttentionBackend):
    """Stands for a layer's attention while its surroundings are recorded: a graph ends, the next
    begins."""

    def __init__(
        self, of: AttentionBackend, buffer: torch.Tensor, breaks: list[Callable[[], None]]
    ) -> None:
        super().__init__(of.shape, of.dtype, of.device)
        self._buffer = buffer
        self._breaks = breaks

    def plan(self, metadata: AttentionMetadata) -> None:
        """Nothing: replay plans the backend itself."""

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """What replay will have put there."""
        into, out = self._buffer
        into.copy_(query)
        for split in self._breaks:
            split()
        return out


def _at(slot_mapping: torch.Tensor) -> AttentionMetadata:
    """All that is read of it in the pieces."""
    none = slot_mapping[:0]
    return AttentionMetadata(none, none, none, slot_mapping, 0, 0, 0, [], [])
