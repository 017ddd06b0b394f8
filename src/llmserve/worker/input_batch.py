# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A plan as the tensors of one step: built by numpy, sent to the device in one copy."""

from dataclasses import dataclass

import numpy as np
import torch

from llmserve.attention.base import AttentionMetadata
from llmserve.core.scheduler_output import SchedulerOutput
from llmserve.worker.request_slots import RequestSlots

_RING = 3  # pinned buffers: steps in flight + 1


@dataclass(slots=True)
class StepInputs:
    """What a forward and a draw need; tensors are on the device.

    `draw_rows` int64 [num_draws] are plan rows, one entry for each drawn position (1 + drafts for
    a row with drafts), `draw_slots` and `draw_index` int32 their slots and output indices.
    """

    input_ids: torch.Tensor  # int64 [num_tokens]
    positions: torch.Tensor  # int64 [num_tokens]
    logits_rows: torch.Tensor  # int64 [num_draws]
    last_slots: torch.Tensor  # int64 [num_draws]
    metadata: list[AttentionMetadata]  # by KV group
    token_starts: np.ndarray  # int64 [num_rows + 1]
    draw_rows: np.ndarray
    draw_slots: np.ndarray
    draw_index: np.ndarray
    decodes: bool = False  # replayed from a graph that can draw too


@dataclass(slots=True)
class HostStep:
    """A plan as arrays, before they are sent. Names as in StepInputs; int64 but for `draw_index`.

    `unknown` are the tokens that only the device knows: the last that their slot drew.
    """

    slots: np.ndarray  # [num_rows]
    starts: np.ndarray  # [num_rows + 1]
    lengths: np.ndarray  # [num_rows]: tokens in the cache after the step
    num_decode_rows: int
    ids: np.ndarray  # [num_tokens]
    positions: np.ndarray
    token_slots: np.ndarray
    mappings: list[np.ndarray]  # by KV group
    unknown: np.ndarray
    logits_rows: np.ndarray  # [num_draws]
    draw_rows: np.ndarray
    draw_slots: np.ndarray
    draw_index: np.ndarray  # int32


class PinnedRing:
    """Copies to the device by pinned buffers in turn, guarded by events."""

    def __init__(self) -> None:
        self._turn = 0
        self._pinned = [torch.empty(0, dtype=torch.int64)] * _RING
        self._sent: list[torch.cuda.Event | None] = [None] * _RING

    def send(self, target: torch.Tensor, values: np.ndarray) -> None:
        """Starts the copy of `values` int64; waits for none but an old one."""
        turn = self._turn = (self._turn + 1) % _RING
        event = self._sent[turn]
        if event is None:
            event = self._sent[turn] = torch.cuda.Event()
        else:
            event.synchronize()
        pinned = self._pinned[turn]
        if len(pinned) < values.size:
            pinned = torch.empty(2 * values.size, dtype=torch.int64, pin_memory=True)
            self._pinned[turn] = pinned
        staged = pinned[: values.size]
        staged.numpy()[:] = values.reshape(-1)
        target.copy_(staged.view(target.shape), non_blocking=True)
        event.record()


class InputBatcher:
    """Builds StepInputs. On CUDA it owns a ring of pinned buffers."""

    def __init__(self, slots: RequestSlots) -> None:
        self.slots = slots
        self.device = slots.device
        self.ring = PinnedRing()

    def read(self, plan: SchedulerOutput, drafts: np.ndarray | None = None) -> HostStep:
        """`drafts` int32 [num_slots, k] where rows of the plan carry draft tokens."""
        slots, count = plan.slots.astype(np.int64), plan.num_scheduled
        starts = np.concatenate(([0], np.cumsum(count, dtype=np.int64)))
        num_tokens = int(starts[-1])
        row = np.repeat(np.arange(len(slots)), count)
        token_slots = slots[row]
        positions = np.arange(num_tokens) + (plan.num_computed - starts[:-1])[row]
        ids = self.slots.tokens[token_slots, positions].astype(np.int64)
        # Behind what the host knows come the slot's last token and then its drafts.
        behind = positions - self.slots.num_tokens[token_slots]
        if drafts is not None:
            drafted = np.arange(num_tokens) - (starts[1:] - plan.num_drafts)[row]
            at = np.flatnonzero(drafted >= 0)
            ids[at] = drafts[token_slots[at], drafted[at]]
            behind[at] = -1

        draws = np.where(plan.sample, 1 + plan.num_drafts, 0)
        draw_rows = np.repeat(np.arange(len(slots)), draws)
        nth = np.arange(len(draw_rows)) - (np.cumsum(draws) - draws)[draw_rows]
        end = plan.num_computed + count
        first_index = end - plan.num_drafts - self.slots.num_prompt_tokens[slots]
        mappings = []
        for table, size in zip(self.slots.tables, self.slots.block_sizes, strict=True):
            block = table[token_slots, positions // size].astype(np.int64)
            mappings.append(block * size + positions % size)
        return HostStep(
            slots=slots,
            starts=starts,
            lengths=end.astype(np.int64),
            num_decode_rows=int(np.argmax(count > 1)) if (count > 1).any() else len(slots),
            ids=ids,
            positions=positions,
            token_slots=token_slots,
            mappings=mappings,
            unknown=np.flatnonzero(behind >= 0),
            logits_rows=starts[1:][draw_rows] - draws[draw_rows] + nth,
            draw_rows=draw_rows,
            draw_slots=slots[draw_rows],
            draw_index=(first_index[draw_rows] + nth).astype(np.int32),
        )

    def build(self, plan: SchedulerOutput, drafts: np.ndarray | None = None) -> StepInputs:
        """The step's tensors; `drafts` as in `read`."""
        host = self.read(plan, drafts)
        unknown, token_slots = host.unknown, host.token_slots
        sent = self._send(
            (host.ids, host.positions, host.logits_rows, host.draw_slots, unknown,
             token_slots[unknown], host.slots, host.starts, host.lengths, *host.mappings)
        )  # fmt: skip
        input_ids, pos, rows, last_slots, unknown_at, unknown_slots, row_slots, start, lens = sent[
            :9
        ]
        if len(unknown):
            last = self.slots.last_token.index_select(0, unknown_slots)
            if len(unknown) == len(host.ids):
                input_ids = last
            else:
                input_ids.index_copy_(0, unknown_at, last)
        lengths, counts = host.lengths.tolist(), plan.num_scheduled.tolist()
        longest = max(lengths)
        query_start, seq_lens = start.int(), lens.int()
        metadata = []
        for group, size in enumerate(self.slots.block_sizes):
            on_device = self.slots.device_tables[group]
            if self.device.type == "cpu":
                on_device = on_device[:, : -(-longest // size)]
            metadata.append(
                AttentionMetadata(
                    query_start=query_start,
                    seq_lens=seq_lens,
                    block_table=on_device.index_select(0, row_slots),
                    slot_mapping=sent[9 + group],
                    block_size=size,
                    num_rows=len(counts),
                    num_decode_rows=host.num_decode_rows,
                    query_lens_cpu=counts,
                    seq_lens_cpu=lengths,
                )
            )
        return StepInputs(
            input_ids, pos, rows, last_slots, metadata, host.starts, host.draw_rows,
            host.draw_slots.astype(np.int32), host.draw_index,
        )  # fmt: skip

    def _send(self, parts: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
        """int64 arrays -> views of one device tensor."""
        packed = np.concatenate(parts)
        sent = torch.from_numpy(packed)
        if self.device.type != "cpu":
            sent = torch.empty(packed.size, dtype=torch.int64, device=self.device)
            self.ring.send(sent, packed)
        return list(sent.split([len(part) for part in parts]))
