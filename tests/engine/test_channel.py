# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import msgspec
import numpy as np
import pytest

from llmserve.core.messages import (
    AbortRequests,
    EngineFailed,
    EngineOutputs,
    LogprobColumns,
    RequestExtra,
)
from llmserve.engine import channel
from llmserve.engine.channel import Codec, parts


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


def test_news_of_many_log_probabilities_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's token and the rest of it come in one, and none is lost."""
    monkeypatch.setattr(channel, "_PART_BYTES", 100)

    def columns(n: int, width: int) -> LogprobColumns:
        return LogprobColumns.pack(np.ones((n, width)), np.ones((n, width)), np.ones(n))

    sizes = {1: 4, 2: 0, 3: 5, 4: 5, 5: 5, 6: 40, 7: 0, 8: 1, 9: 12}
    extras = {
        wire_id: RequestExtra(num_cached_tokens=wire_id, logprobs=columns(1, n) if n else None)
        for wire_id, n in sizes.items()
    }
    extras[3] = RequestExtra(prompt_logprobs=columns(5, 1))
    ids = np.array([5, 1, 10, 6, 9, 5, 2], np.uint32)
    news = EngineOutputs(ids=ids.tobytes(), tokens=(ids * 7).astype(np.int32).tobytes())
    assert parts(news) == [news]
    news.extras = extras
    cut = parts(news)
    assert [list(part.extras) for part in cut] == [[1, 2, 3], [4, 5], [6, 7], [8], [9]]
    assert {wire_id: part.extras[wire_id] for part in cut for wire_id in part.extras} == extras
    assert [np.frombuffer(part.ids, np.uint32).tolist() for part in cut] == [
        [1, 10, 2], [5, 5], [6], [], [9]
    ]  # fmt: skip
    for part in cut:
        tokens = np.frombuffer(part.tokens, np.int32)
        assert tokens.tolist() == (7 * np.frombuffer(part.ids, np.uint32)).tolist()
