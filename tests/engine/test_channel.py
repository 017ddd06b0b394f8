# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import msgspec
import pytest

from llmserve.core.messages import AbortRequests, EngineFailed, EngineOutputs, RequestExtra
from llmserve.engine.channel import Codec


def test_codec_round_trips_both_directions() -> None:
    codec = Codec()
    outputs = EngineOutputs(
        ids=b"\1\0\0\0", tokens=b"\2\0\0\0", extras={1: RequestExtra(error="x")}
    )
    for message in (outputs, EngineFailed("why", True)):
        assert codec.decode_from_engine(codec.encode(message)) == message
    abort = AbortRequests(0, [1, 2])
    assert codec.decode_to_engine(codec.encode(abort)) == abort


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"\x93\xa3req\x01", b"\xc1", b"cos\nsystem\n", b"\x91" * 5000]
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises((msgspec.DecodeError, msgspec.ValidationError, RecursionError)):
        Codec().decode_to_engine(data)
