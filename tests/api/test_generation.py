# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Several streams as one, and the pace of chunks."""

import asyncio
from typing import Any

import pytest

from llmserve.api.generation import Generation, Pace
from llmserve.core.outputs import Delta
from llmserve.errors import EngineError, NumericalError


class Stream:
    """A RequestStream that says `news`, one list a call."""

    def __init__(self, *news: list[Delta] | Exception) -> None:
        self.news = list(news)
        self.prompt_token_ids = [1, 2, 3]
        self.num_cached_tokens = 2
        self.aborted = False

    @property
    def finished(self) -> bool:
        return not self.news

    async def next(self) -> list[Delta]:
        await asyncio.sleep(0)
        news = self.news.pop(0) if self.news else []
        if isinstance(news, Exception):
            raise news
        return news

    def abort(self) -> None:
        self.aborted = True


def delta(index: int, text: str, finish: str | None = None) -> Delta:
    return Delta(index, text, [ord(c) for c in text], None, finish)


def generation(n: int, *streams: Stream) -> Generation:
    return Generation(list(streams), n)  # type: ignore[arg-type]


async def test_choices_of_prompt_i_start_at_i_times_n() -> None:
    made = generation(
        2,
        Stream([delta(0, "a"), delta(1, "b")], [delta(1, "B", "stop")], [delta(0, "A", "length")]),
        Stream([delta(1, "d", "stop")], [delta(0, "c", "stop")]),
    )
    choices = await made.collect()
    assert [choice.text for choice in choices] == ["aA", "bB", "c", "d"]
    assert [choice.finish_reason for choice in choices] == ["length", "stop", "stop", "stop"]
    assert made.usage() == {
        "prompt_tokens": 6,
        "total_tokens": 12,
        "completion_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": None,
    }


async def test_an_error_of_one_prompt_aborts_the_others() -> None:
    good = Stream(*[[delta(0, "x")]] * 50)
    made = generation(1, Stream([delta(0, "a")], NumericalError("NaN")), good)
    with pytest.raises(NumericalError):
        await made.collect()
    assert good.aborted and made.aborted


@pytest.mark.parametrize("others", [(), (Stream([delta(0, "a", "stop")]),)])
async def test_a_stream_that_stops_without_an_end_is_an_error(others: Any) -> None:
    with pytest.raises(EngineError):
        await generation(1, Stream([delta(0, "a")]), *others).collect()


async def test_finish_reason_error_is_raised() -> None:
    with pytest.raises(EngineError):
        await generation(1, Stream([delta(0, "a", "error")])).collect()


def test_pace_holds_back_all_but_the_first_and_the_last() -> None:
    pace = Pace(3)
    texts = []
    for i, text in enumerate("abcdefgh"):
        out = pace.take([delta(0, text, "stop" if i == 7 else None)])
        texts.append([one.text for one in out])
        assert all(one.token_ids == [ord(c) for c in one.text] for one in out)
    assert texts == [["a"], [], [], ["bcd"], [], [], ["efg"], ["h"]]


def test_pace_keeps_logprobs_and_choices_apart() -> None:
    pace = Pace(2)
    assert len(pace.take([delta(0, "x"), delta(1, "x")])) == 2
    held = delta(0, "a")
    held.logprobs = [([1], [-1.0], 1)]
    assert pace.take([held, delta(1, "q")]) == []
    last = delta(0, "b")
    last.logprobs = [([2], [-2.0], 1)]
    (out,) = pace.take([last])
    assert out.text == "ab"
    assert out.logprobs == [([1], [-1.0], 1), ([2], [-2.0], 1)]
