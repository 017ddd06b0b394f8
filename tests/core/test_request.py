# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Limits and stop tokens of a request."""

import numpy as np
import pytest

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams


def _request(length: int = 10, **params: object) -> Request:
    message = EngineRequest(
        client=2, request_id=7, prompt=np.arange(length, dtype=np.int32).tobytes(),
        params=SamplingParams(**params), arrival=0.0,  # type: ignore[arg-type]
    )  # fmt: skip
    return Request(message, 32, frozenset({1, 2}))


@pytest.mark.parametrize(
    ("max_tokens", "total"), [(None, 32), (5, 15), (22, 32), (99, 32), (0, 10)]
)
def test_limit(max_tokens: int | None, total: int) -> None:
    assert _request(max_tokens=max_tokens).max_total_tokens == total


def test_stop_tokens() -> None:
    assert _request().stop_token_ids == {1, 2}
    assert _request(stop_token_ids=[5]).stop_token_ids == {1, 2, 5}
    assert _request(stop_token_ids=[5], ignore_eos=True).stop_token_ids == {5}


def test_tokens_grow_under_a_copy() -> None:
    request = _request(3)
    before = request.token_ids
    request.tokens += np.array([9], np.int32).tobytes()
    assert before.tolist() == [0, 1, 2] and request.token_ids.tolist() == [0, 1, 2, 9]
    assert request.num_tokens == 4 and request.num_prompt_tokens == 3
    assert request.key == 2 << 32 | 7


def test_prompt_logprobs_are_wanted_until_all_are_told() -> None:
    assert not _request().wants_prompt_logprobs
    assert not _request(1, prompt_logprobs=0).wants_prompt_logprobs
    request = _request(10, prompt_logprobs=0)
    assert request.wants_prompt_logprobs
    request.prompt_logprobs_done = 9
    assert not request.wants_prompt_logprobs
