# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import time

import numpy as np
import pytest
import torch

from llmserve.worker.mask_gate import MaskGate


def test_where_nothing_waits_the_words_are_copied_as_they_are() -> None:
    gate = MaskGate(4, 3, torch.device("cpu"))
    assert not gate.can_wait
    for rows in (1, 4, 2):
        words = np.random.default_rng().integers(-9, 9, (rows, 3), np.int32)
        gate.words[:rows] = words
        assert gate.enqueue(rows, gate.next()).tolist() == words.tolist()


@pytest.mark.gpu
def test_the_device_waits_for_words_that_come_later() -> None:
    """Again and again, also past the largest count; and not for words that are there."""
    gate = MaskGate(64, 4748, torch.device("cuda"))
    assert gate.can_wait
    rng = np.random.default_rng()
    for turn in range(20):
        if turn == 10:
            gate._count = 0xFFFFFFFF - 5
            gate.open()
        if turn % 3 == 2:  # the one before is opened when this one has its number
            number = gate.next()
            gate.open(number - 1 & 0xFFFFFFFF)
        else:
            number = gate.next()
        rows = int(rng.integers(1, 65))
        words = rng.integers(-9, 9, (rows, 4748), np.int32)
        gate.words[:rows] = 0
        is_early = turn % 4 == 3
        if is_early:
            gate.words[:rows] = words
        got = gate.enqueue(rows, number).clone()
        done = torch.cuda.Event()
        done.record()
        if not is_early:
            time.sleep(0.01)
            assert not done.query()
            gate.words[:rows] = words
        gate.open(number)
        done.synchronize()
        assert np.array_equal(got.cpu().numpy(), words)
