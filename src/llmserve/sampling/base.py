# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a sampling feature is, and the rows it works on. Own processors subclass LogitsProcessor.

A processor named by `--logits-processors package.module:Class` is built once at start and asked for
every request:

    class OnlyEven(LogitsProcessor):
        def __init__(self, context: SamplerContext) -> None:
            self.odd = slot_buffer((context.logits_width,), torch.bool, context.device)
            self.odd[1::2] = True

        def add(self, slot: int, request: NewRequest) -> bool:
            return bool(request.params.extra_args.get("only_even"))

        def apply(self, logits: Tensor, rows: Rows) -> None:
            logits.masked_fill_(self.odd, -math.inf)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest


@dataclass(frozen=True)
class SamplerContext:
    """What a processor may size its buffers by. Slots are 1 .. num_slots - 1; 0 is padding."""

    num_slots: int
    logits_width: int
    device: torch.device
    eos_token_ids: list[int]


class Rows:
    """Some rows of a batch, in the order in which `of` gives their logits.

    The object stays the same from step to step for as long as the batch holds the same requests, so
    whatever depends on nothing else may be kept for it. Only `output_index_cpu` changes.
    """

    __slots__ = ("_index", "_span", "device", "index_cpu", "output_index_cpu", "slots", "slots_cpu")

    def __init__(self, index: np.ndarray, slots: np.ndarray, device: torch.device) -> None:
        self.device = device
        self.index_cpu = index  # int64 [m], ascending rows of the batch
        self.slots_cpu = slots  # int64 [m]
        self.slots = to_device(slots, device)  # int64 [m]
        self.output_index_cpu = slots  # int64 [m], set anew in each step
        contiguous = len(index) > 0 and index[-1] - index[0] + 1 == len(index)
        self._span = slice(int(index[0]), int(index[-1]) + 1) if contiguous else None
        self._index = None if contiguous else to_device(index, device)

    def __len__(self) -> int:
        return len(self.index_cpu)

    @property
    def output_index(self) -> Tensor:
        """int64 [m]: how many tokens each request has drawn before this one."""
        return to_device(self.output_index_cpu, self.device)

    def of(self, batch: Tensor) -> Tensor:
        """These rows of `batch` [n, ...]: a view where they are neighbours, else a copy."""
        if self._span is not None:
            return batch[self._span]
        assert self._index is not None
        return batch.index_select(0, self._index)

    def put(self, batch: Tensor, part: Tensor) -> None:
        """Writes what `of` gave, or something of its shape, back into `batch`."""
        if self._span is None:
            assert self._index is not None
            batch.index_copy_(0, self._index, part)
        elif batch[self._span].data_ptr() != part.data_ptr():
            batch[self._span] = part


class LogitsProcessor(ABC):
    """One sampling feature. It owns its per-slot state; nothing else reads or writes it.

    Drawn tokens are not known to the host when the next step is enqueued, so what depends on them
    lives on the device and is kept up by `update`. None of the methods may wait for the device.
    """

    def __init__(self, context: SamplerContext) -> None:
        self.context = context

    @abstractmethod
    def add(self, slot: int, request: NewRequest) -> bool:
        """A request enters `slot`; False if the feature has nothing to do for it.

        All state of the slot is set anew from `request`: after a preemption its `token_ids` hold
        the output so far behind `num_prompt_tokens` of prompt. Must not raise.
        """

    def remove(self, slot: int) -> None:  # noqa: B027 (optional)
        """The request in `slot`, for which `add` was true, has gone."""

    @abstractmethod
    def apply(self, logits: Tensor, rows: Rows) -> None:
        """Changes `logits` float32 [m, logits_width] in place; row i is of `rows.slots[i]`.

        Only rows whose `add` was true are given, and each must be treated by itself.
        """

    def update(self, rows: Rows, token_ids: Tensor) -> None:  # noqa: B027 (optional)
        """`token_ids` int64 [m] were drawn for the rows given to `apply` in this step."""


class SparseEntries:
    """Per slot a list of token ids with one value each, joined over rows when they are needed."""

    def __init__(self, context: SamplerContext) -> None:
        self._context = context
        self._slots: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._rows: Rows | None = None
        self._joined: tuple[Tensor, Tensor] | None = None

    def set(self, slot: int, ids: list[int], values: list[float]) -> None:
        """Replaces what `slot` has."""
        self._slots[slot] = (np.array(ids, np.int64), np.array(values, np.float32))

    def clear(self, slot: int) -> None:
        """Forgets `slot`."""
        del self._slots[slot]

    def join(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Offsets into the rows' flattened logits, int64 [e], and their values, float32 [e]."""
        if self._rows is not rows or self._joined is None:
            entries = [self._slots[slot] for slot in rows.slots_cpu.tolist()]
            width = self._context.logits_width
            offsets = np.concatenate([ids + i * width for i, (ids, _) in enumerate(entries)])
            values = np.concatenate([values for _, values in entries])
            device = self._context.device
            self._joined = to_device(offsets, device), to_device(values, device)
            self._rows = rows
        return self._joined


def slot_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU, pages that no request touches take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.zeros(shape, numpy_dtype))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on `device` (on the CPU a view), enqueued without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send(target: Tensor, array: np.ndarray) -> None:
    """Into `target`, enqueued without waiting; on the CPU `array` is read at once."""
    source = torch.from_numpy(array)
    target.copy_(source if target.device.type == "cpu" else source.pin_memory(), non_blocking=True)
