# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Who is let in, and what the others are told."""

import re

import numpy as np
import pytest

from llmserve.core import sampling_params
from llmserve.core.messages import EngineRequest, RequestExtra
from llmserve.core.sampling_params import SamplingParams
from tests.helpers.fake_worker import VOCABULARY
from tests.helpers.simulation import Episode, World


def _episode(**world: object) -> Episode:
    return Episode(World(**world), 0)  # type: ignore[arg-type]


def _message(prompt: list[int], wire_id: int = 1, **params: object) -> EngineRequest:
    return EngineRequest(
        client=4, request_id=wire_id, prompt=np.array(prompt, np.int32).tobytes(),
        params=SamplingParams(**params), arrival=0.0,  # type: ignore[arg-type]
    )  # fmt: skip


def _refused(episode: Episode, message: EngineRequest) -> RequestExtra:
    episode.scheduler.add(message)
    extra = episode.scheduler.take_outputs()[message.client].extras[message.request_id]
    assert extra.finish_reason == "error"
    return extra


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (_message([]), "invalid_request_error", "empty"),
        (_message([1] * 64), "context_length_exceeded", "64 tokens.*at most 63"),
        (_message([1, VOCABULARY]), "invalid_request_error", "97 is outside 0 to 96"),
        (_message([-1]), "invalid_request_error", "-1 is outside 0 to 96"),
        (_message([1], stop_token_ids=[97]), "integer_above_max_value", "stop_token_ids"),
        (_message([1], logprobs=98), "integer_above_max_value", "logprobs"),
        (_message([1] * 63, prompt_logprobs=9), "integer_above_max_value", "630; .* at most 629"),
    ],
)
def test_bad_requests_are_answered(
    message: EngineRequest, error: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_params, "MAX_LOGPROBS", 629)
    episode = _episode()
    extra = _refused(episode, message)
    assert extra.error == error and re.search(says, extra.message or "")
    assert not episode.scheduler.has_unfinished()


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    episode = _episode()
    episode.scheduler.kv.pool.num_blocks = 10
    extra = _refused(episode, _message([1] * 30, max_tokens=8))
    assert extra.error == "context_length_exceeded"
    assert "30 prompt tokens and max_tokens 8 need 10 KV blocks; the whole cache has 9" in (
        extra.message or ""
    )
    episode.scheduler.add(_message([1] * 30, 2, max_tokens=7))
    assert episode.scheduler.has_unfinished()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"max_num_queued_reqs": 2}, "2 requests are waiting"),
        ({"max_num_queued_tokens": 25}, "20 prompt tokens are waiting already; at most 25"),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_full_queue_is_503(flags: dict[str, int], says: str, held: bool) -> None:
    episode = _episode(scheduler=flags)
    for wire_id in (1, 2):
        episode.scheduler.add(_message([1] * 10, wire_id), hold=held)
    extra = _refused(episode, _message([1] * 10, 3))
    assert extra.error == "server_is_overloaded" and says in (extra.message or "")
    stats = episode.scheduler.stats()
    assert (stats.num_waiting, stats.num_waiting_tokens, stats.num_held) == (2, 20, 2 * held)


def test_without_chunks_a_prompt_must_fit_a_step() -> None:
    flags = {"max_num_batched_tokens": 20, "enable_chunked_prefill": False}
    extra = _refused(_episode(scheduler=flags), _message([1] * 21))
    assert "at most --max-num-batched-tokens 20" in (extra.message or "")


def test_unseeded_requests_get_seeds_that_the_batch_does_not_change() -> None:
    def seeds(wire_ids: list[int], max_num_seqs: int) -> dict[tuple[int, int], int]:
        episode = _episode(scheduler={"max_num_seqs": max_num_seqs}, depth=1)
        for wire_id in wire_ids:
            episode.scheduler.add(_message([wire_id], wire_id, max_tokens=1))
        found = {}
        while (plan := episode.scheduler.schedule()) is not None:
            for new in plan.new_requests:
                found[4, int(new.token_ids[0])] = new.seed
            episode.scheduler.commit(plan, episode.worker.execute(plan))
        return found

    alone, together = seeds([1, 2, 3, 4, 5], 1), seeds([1, 2, 3, 4, 5], 5)
    assert alone == together
    assert len(set(alone.values())) == 5 and all(0 <= s < 2**63 for s in alone.values())
