# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import msgspec
import numpy as np
import pytest

from llmserve.core.messages import (
    AbortRequests,
    EngineOutputs,
    EngineRequest,
    LogprobColumns,
    RequestExtra,
    SchedulerStats,
    ToEngine,
    UtilityCall,
)
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import RequestError


def test_every_message_to_the_engine_keeps_its_kind() -> None:
    prompt = np.arange(5, dtype=np.int32)
    request = EngineRequest(
        client=1, request_id=7, prompt=prompt.tobytes(), params=SamplingParams(seed=3), arrival=1.5
    )
    for message in (request, AbortRequests(0, [1, 2]), UtilityCall(0, 3, "ping", [1, "a"])):
        got = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngine)
        assert got == message
    np.testing.assert_array_equal(request.prompt_token_ids, prompt)


def test_a_message_with_params_out_of_range_is_refused() -> None:
    """The engine checks again what the frontend checked."""
    request = EngineRequest(
        client=0, request_id=1, prompt=b"", params=SamplingParams(), arrival=0.0
    )
    request.params.temperature = -1.0
    with pytest.raises(RequestError, match="temperature"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ToEngine)


def test_columns_unpack_to_what_was_packed() -> None:
    rng = np.random.default_rng()
    ids = rng.integers(0, 1000, (3, 4)).astype(np.int32)
    logprobs = -rng.random((3, 4)).astype(np.float32)
    ranks = rng.integers(1, 9, 3).astype(np.int32)
    for got, want in zip(
        LogprobColumns.pack(ids, logprobs, ranks).unpack(), (ids, logprobs, ranks), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_a_step_of_256_tokens_is_small() -> None:
    """Two buffers, whatever the number of rows: about 8 bytes a token."""
    ids = np.arange(256, dtype=np.uint32).tobytes()
    outputs = EngineOutputs(ids=ids, tokens=ids, extras={3: RequestExtra(finish_reason="stop")})
    outputs.stats = SchedulerStats(num_running=256)
    data = msgspec.msgpack.encode(outputs)
    assert len(data) < 2 * len(ids) + 100
    assert msgspec.msgpack.decode(data, type=EngineOutputs) == outputs
