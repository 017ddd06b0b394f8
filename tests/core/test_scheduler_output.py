# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np

from llmserve.core.messages import LogprobColumns
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import (
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenMask,
    decode_mask,
    decode_output,
    decode_plan,
    encode,
)


def test_plan_crosses_a_process_edge_unchanged() -> None:
    rng = np.random.default_rng()
    rows = 5
    plan = SchedulerOutput(
        step=7,
        slots=rng.integers(1, 9, rows).astype(np.int32),
        num_computed=rng.integers(0, 99, rows).astype(np.int32),
        num_scheduled=rng.integers(1, 9, rows).astype(np.int32),
        num_drafts=np.zeros(rows, np.int32),
        sample=rng.integers(0, 2, rows).astype(bool),
        new_blocks=rng.integers(0, 99, (3, 4)).astype(np.int32),
        new_requests=[
            NewRequest(3, np.arange(4, dtype=np.int32), 4, -1, SamplingParams(seed=3), [[1]])
        ],
        released=[2],
    )
    got = decode_plan(encode(plan))
    for field in ("slots", "num_computed", "num_scheduled", "num_drafts", "sample", "new_blocks"):
        mine, theirs = getattr(plan, field), getattr(got, field)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert got.new_requests[0].params == plan.new_requests[0].params
    np.testing.assert_array_equal(got.new_requests[0].token_ids, np.arange(4))
    assert (got.step, got.released, got.num_rows, got.num_tokens) == (7, [2], 5, plan.num_tokens)


def test_output_crosses_a_process_edge_unchanged() -> None:
    columns = LogprobColumns.pack(np.array([[4, 5]]), np.array([[-0.5, -1.0]]), np.array([1]))
    output = ModelRunnerOutput(
        np.array([[1], [2]], np.int32),
        np.array([1, 0], np.int32),
        np.array([False, True]),
        {0: columns},
        seconds=0.25,
    )
    got = decode_output(encode(output))
    np.testing.assert_array_equal(got.token_ids, output.token_ids)
    assert got.invalid is not None and got.seconds == 0.25
    assert got.invalid.tolist() == [False, True]
    ids, logprobs, ranks = got.logprobs[0].unpack()
    assert (ids.tolist(), logprobs.tolist(), ranks.tolist()) == ([[4, 5]], [[-0.5, -1.0]], [1])


def test_mask_crosses_a_process_edge_unchanged() -> None:
    mask = TokenMask(np.array([3, 1], np.int32), np.array([[-1, 5], [0, 7]], np.int32))
    got = decode_mask(encode(mask))
    assert got is not None
    for field in ("slots", "words"):
        mine, theirs = getattr(mask, field), getattr(got, field)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert decode_mask(encode(None)) is None
