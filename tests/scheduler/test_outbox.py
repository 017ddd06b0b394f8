# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Columns per client, and merged extras."""

import numpy as np

from llmserve.core.messages import LogprobColumns
from llmserve.scheduler.outbox import Outbox, cut


def _columns(*ids: int) -> LogprobColumns:
    column = np.array(ids, np.int32).reshape(-1, 1)
    return LogprobColumns.pack(column, column * 0.5, np.arange(len(ids)))


def _ids(columns: LogprobColumns | None) -> list[int]:
    assert columns is not None
    return columns.unpack()[0][:, 0].tolist()


def test_each_client_gets_its_own_in_order() -> None:
    box = Outbox()
    box.tokens(np.array([0, 1, 0]), np.array([5, 5, 6], np.uint32), np.array([1, 2, 3], np.int32))
    box.tokens(np.array([0]), np.array([5], np.uint32), np.array([4], np.int32))
    box.extra(2, 9).finish_reason = "abort"
    out = box.take()
    told = {
        client: list(
            zip(np.frombuffer(o.ids, np.uint32), np.frombuffer(o.tokens, np.int32), strict=True)
        )
        for client, o in out.items()
    }
    assert told == {0: [(5, 1), (6, 3), (5, 4)], 1: [(5, 2)], 2: []}
    assert out[2].extras[9].finish_reason == "abort" and not out[0].extras
    assert box.take() == {}


def test_logprobs_of_several_steps_are_joined() -> None:
    box = Outbox()
    for ids in ((1,), (2, 3)):
        box.logprobs([(3, 7, _columns(*ids))])
        box.prompt_logprobs(3, 7, _columns(*ids, 9))
    extra = box.take()[3].extras[7]
    assert _ids(extra.logprobs) == [1, 2, 3]
    assert _ids(extra.prompt_logprobs) == [1, 9, 2, 3, 9]


def test_cut() -> None:
    columns = _columns(4, 5, 6)
    assert cut(columns, 0, 3) is columns
    assert _ids(cut(columns, 1, 3)) == [5, 6]
    assert _ids(cut(columns, 0, 1)) == [4]
    assert cut(columns, 1, 2).unpack()[2].tolist() == [1]
