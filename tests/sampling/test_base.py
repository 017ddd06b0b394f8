# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math

import numpy as np
import pytest
import torch

from llmserve.core.scheduler_output import NewRequest
from llmserve.errors import ConfigError
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, slot_buffer
from tests.helpers.sampling import new_request, new_sampler, sample


class NeverTwice(LogitsProcessor):
    """Forbids the token drawn last: an own processor with state on the device."""

    def __init__(self, context: SamplerContext) -> None:
        super().__init__(context)
        self.last = slot_buffer((context.num_slots,), torch.int64, context.device)

    def add(self, slot: int, request: NewRequest) -> bool:
        self.last[slot] = int(request.token_ids[-1])
        return bool(request.params.extra_args.get("never_twice"))

    def apply(self, logits: torch.Tensor, rows: Rows) -> None:
        logits.scatter_(1, self.last[rows.slots][:, None], -math.inf)

    def update(self, rows: Rows, token_ids: torch.Tensor) -> None:
        self.last[rows.slots] = token_ids


PATH = f"{__name__}:NeverTwice"


def test_an_own_processor_is_loaded_by_path_and_sees_only_its_rows() -> None:
    sampler = new_sampler(width=6, processors=[PATH])
    for slot, asked in [(1, True), (2, False), (3, True)]:
        sampler.add(new_request(slot, [4], temperature=0.0, extra_args={"never_twice": asked}))
    logits = np.tile(np.array([0.0, 1, 2, 3, 5, 4]), (3, 1))
    tokens = [sample(sampler, logits, [1, 2, 3], [i] * 3) for i in range(3)]
    assert tokens == [[5, 4, 5], [4, 4, 4], [5, 4, 5]]


@pytest.mark.parametrize(
    "path",
    ["no_such_module:X", "llmserve.sampling.base:Missing", "llmserve.sampling.base:Rows", ""],
)
def test_what_cannot_be_used_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="--logits-processors") as error:
        new_sampler(processors=[path])
    assert repr(path) in error.value.message


def test_rows_read_and_write_their_own_rows() -> None:
    batch = torch.arange(12.0).view(6, 2)
    for index in ([2], [1, 2, 3], [0, 5], [], [0, 1, 2, 3, 4, 5]):
        rows = Rows(np.array(index, np.int64), np.array(index, np.int64), torch.device("cpu"))
        part = rows.of(batch)
        assert torch.equal(part, batch[index])
        for new in (part.mul_(-1), part * 2):
            whole = batch.clone()
            whole[index] = new
            rows.put(batch, new)
            assert torch.equal(batch, whole)
