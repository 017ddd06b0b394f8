# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The masks of a step, for which the device can wait instead of the host.

A mask needs the tokens of the step before. Were its draw not enqueued before they are known, the
device would idle while the host plans and enqueues what comes behind the draw.
"""

import ctypes
import platform

import numpy as np
import torch

_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ, cuda.h: as a difference of int32, so counts may wrap


class MaskGate:
    """`words` int32 [rows, num_words] in pinned memory and `on_device` its copy.

    Masks have numbers, from `next`; each is enqueued and opened in their order. `words` are those
    of mask n once what was drawn under mask n - 1 is known, and until n is opened.
    """

    def __init__(self, rows: int, num_words: int, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self.on_device = torch.zeros((rows, num_words), dtype=torch.int32, device=device)
        self._pinned = torch.zeros((rows, num_words), dtype=torch.int32, pin_memory=on_card)
        self.words = self._pinned.numpy()
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=on_card)
        self._opened = self._flag.numpy().view(np.uint32)
        self._count = 0
        # What x86 writes is seen in the order in which it was written; the flag is last
        self._driver = None
        if on_card and platform.machine() == "x86_64":
            self._driver = ctypes.CDLL("libcuda.so.1")
        self.can_wait = self._driver is not None and self._wait(0) == 0

    def _wait(self, number: int) -> int:
        """CUresult. The stream waits until the flag has reached `number`."""
        assert self._driver is not None
        status: int = self._driver.cuStreamWaitValue32_v2(
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_uint64(self._flag.data_ptr()),
            ctypes.c_uint32(number),
            ctypes.c_uint(_GEQ),
        )
        return status

    def next(self) -> int:
        """The number of the next mask."""
        self._count = (self._count + 1) & 0xFFFFFFFF
        return self._count

    def enqueue(self, rows: int, number: int) -> torch.Tensor:
        """int32 [rows, num_words] on the device, of what `words` are when `number` is opened; where
        the device cannot wait (`can_wait`), of what they are now."""
        if self.can_wait and self._wait(number):
            raise RuntimeError("the driver refuses to wait for a value in memory")
        return self.on_device[:rows].copy_(self._pinned[:rows], non_blocking=True)

    def open(self, number: int | None = None) -> None:
        """What waits for mask `number` or one before it, None: for any, goes on."""
        self._opened[0] = self._count if number is None else number
