# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math
from typing import Any

import msgspec
import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 10**9),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2**63),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("seed", 2**63),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("bad_words", ["x"] * 129),
        ("bad_words", [""]),
        ("allowed_token_ids", []),
        ("logit_bias", {3: math.nan}),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in str(caught.value)


def test_borders_are_legal() -> None:
    SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, presence_penalty=-2.0)
    SamplingParams(
        temperature=2.0, top_p=1e-9, repetition_penalty=1e-3, seed=-(2**63), max_tokens=0
    )
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="x").stop == ["x"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field", ["logit_bias", "allowed_token_ids", "stop_token_ids", "bad_words"]
)
@pytest.mark.parametrize("token", [-1, 100, 2**31, 2**62])
def test_token_ids_outside_the_logits_are_named(field: str, token: int) -> None:
    values: dict[str, Any] = {
        "logit_bias": {"logit_bias": {token: 1.0}},
        "allowed_token_ids": {"allowed_token_ids": [1, token]},
        "stop_token_ids": {"stop_token_ids": [token]},
        "bad_words": {"bad_words_token_ids": [[1], [2, token]]},
    }
    params = SamplingParams(**values[field])
    with pytest.raises(RequestError, match=f"{token}") as caught:
        params.check_token_ids(100)
    assert caught.value.param == field
    assert "99" in str(caught.value)


def test_token_ids_inside_pass() -> None:
    SamplingParams(logit_bias={0: 1.0, 99: -1.0}, stop_token_ids=[99]).check_token_ids(100)


def test_wire_round_trip_keeps_every_field() -> None:
    params = SamplingParams(
        n=2, seed=-5, stop=["a"], logit_bias={7: 1.5}, max_tokens=None, logprobs=3
    )
    data = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(data, type=SamplingParams) == params
    assert len(data) < 120  # defaults do not travel
