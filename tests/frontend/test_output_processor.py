# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Scripted engine messages, and what becomes of them."""

import random

import numpy as np
import pytest

from llmserve.core.messages import EngineOutputs, LogprobColumns, RequestExtra, SchedulerStats
from llmserve.core.outputs import Delta
from llmserve.core.sampling_params import RepetitionDetection, SamplingParams
from llmserve.errors import (
    EngineDeadError,
    EngineError,
    LLMServeError,
    NumericalError,
    OverloadedError,
    RequestError,
)
from llmserve.frontend import output_processor
from llmserve.frontend.output_processor import (
    Gathered,
    OutputProcessor,
    Request,
    RequestTimings,
    child_seed,
)
from tests.helpers.frontend import FakeClient, byte_level, step

TOKENIZER = byte_level()
END = 0


class Observer:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, RequestTimings, int]] = []
        self.num_steps = 0

    def on_arrival(self, timings: RequestTimings) -> None:
        self.calls.append(("arrival", timings, 0))

    def on_first_token(self, timings: RequestTimings) -> None:
        self.calls.append(("first", timings, timings.num_generation_tokens))

    def on_tokens(self, timings: RequestTimings, count: int, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append(("tokens", timings, count))

    def on_finish(self, timings: RequestTimings) -> None:
        self.calls.append(("finish", timings, 0))

    def on_step(self) -> None:
        self.num_steps += 1


class Bench:
    """A processor, its client, and a way to submit."""

    def __init__(self) -> None:
        self.client = FakeClient()
        self.processor = OutputProcessor(self.client, TOKENIZER)  # type: ignore[arg-type]
        self.observer = Observer()
        self.processor.observer = self.observer

    def submit(self, **params: object) -> Request:
        values = {"max_tokens": 50} | params
        request = Request("r", [5, 6, 7], SamplingParams(**values))  # type: ignore[arg-type]
        self.processor.submit(request)
        return request

    def ids(self, request: Request) -> list[int]:
        return list(request.unfinished)

    def feed(self, *messages: EngineOutputs) -> None:
        self.processor.process(messages)


def finish(reason: str = "length", **fields: object) -> RequestExtra:
    return RequestExtra(finish_reason=reason, **fields)  # type: ignore[arg-type]


def columns(ids: list[int], k: int = 1) -> LogprobColumns:
    """Each token with itself and its successors as alternatives; log-probability -id."""
    table = np.array([[i, *range(i, i + k)] for i in ids], np.int32).reshape(len(ids), k + 1)
    return LogprobColumns.pack(table, -table.astype(np.float32), np.ones(len(ids), np.int32))


def test_what_is_sent() -> None:
    bench = Bench()
    request = bench.submit(n=3, seed=7, prompt_logprobs=1)
    first, second, third = bench.client.requests
    assert len({m.request_id for m in (first, second, third)}) == 3
    assert {m.client for m in (first, second, third)} == {FakeClient.index}
    assert first.prompt_token_ids.tolist() == [5, 6, 7]
    assert [m.params.n for m in (first, second, third)] == [1, 1, 1]
    assert [m.params.seed for m in (first, second, third)] == [
        7, child_seed(7, 1), child_seed(7, 2)
    ]  # fmt: skip
    assert [m.params.prompt_logprobs for m in (first, second, third)] == [1, None, None]
    assert request.params.n == 3
    seeds = {child_seed(seed, i) for seed in (-1, 0, 1, 2**63 - 1) for i in range(1, 129)}
    assert len(seeds) == 4 * 128 and all(0 <= seed < 2**63 for seed in seeds)


def test_random_interleavings_give_whole_texts() -> None:
    rng = random.Random(5)
    bench = Bench()
    texts = ["the cat sat on the mat", "naïve café 日本語 😀", "한국어 the dog's bone", ""]
    requests = [bench.submit(ignore_eos=True) for _ in texts]
    wires = [bench.ids(r)[0] for r in requests]
    left = [TOKENIZER.encode(text) for text in texts]
    wanted = [list(ids) for ids in left]
    seen: list[list[Delta]] = [[] for _ in texts]
    ended: set[int] = set()
    while len(ended) < len(texts):
        messages = []
        for _ in range(rng.randint(1, 3)):  # steps that piled up
            rows, extras = [], {}
            for i, ids in enumerate(left):
                if i in ended or rng.random() < 0.3:
                    continue
                for _ in range(rng.randint(1, 2)):
                    if ids:
                        rows.append((wires[i], ids.pop(0)))
                if not ids:
                    ended.add(i)
                    extras[wires[i]] = finish()
            rows.append((2**32 - 1, 5))  # nobody's
            messages.append(step(rows, extras))
        bench.feed(*messages)
        if rng.random() < 0.5:
            for deltas, request in zip(seen, requests, strict=True):
                deltas += request.take()
    for i, request in enumerate(requests):
        seen[i] += request.take()
        assert "".join(d.text for d in seen[i]) == texts[i]
        assert [t for d in seen[i] for t in d.token_ids] == wanted[i]
        assert [d.finish_reason for d in seen[i] if d.finish_reason] == ["length"]
        assert request.finished and not request.take()
    assert bench.processor.num_unfinished == 0
    assert bench.client.aborted == []


def test_news_is_announced_once_until_taken() -> None:
    bench = Bench()
    request = bench.submit(n=2)
    calls: list[int] = []
    request.on_news = lambda: calls.append(1)
    a, b = bench.ids(request)
    bench.feed(step([(a, 5), (b, 6)]))
    bench.feed(step([(a, 7)]))
    assert calls == [1]
    deltas = request.take()
    assert [(d.index, d.token_ids) for d in deltas] == [(0, [5, 7]), (1, [6])]
    bench.feed(step([(b, 8)]))
    assert calls == [1, 1] and request.take()[0].token_ids == [8]


@pytest.mark.parametrize("include", [False, True])
def test_text_of_the_token_that_stopped(include: bool) -> None:
    ids = TOKENIZER.encode("the cat")
    bench = Bench()
    request = bench.submit(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    wire = bench.ids(request)[0]
    bench.feed(step([(wire, t) for t in ids], {wire: finish("stop", stop_reason=ids[-1])}))
    (delta,) = request.take()
    last = TOKENIZER.token_str(ids[-1])
    assert delta.text == ("the cat" if include else "the cat".removesuffix(last))
    assert delta.token_ids == ids  # it was generated, so it counts
    assert (delta.finish_reason, delta.stop_reason) == ("stop", ids[-1])
    request = bench.submit(skip_special_tokens=False)
    wire = bench.ids(request)[0]
    bench.feed(step([(wire, END)], {wire: finish("length")}))
    assert request.take()[0].text == "<|end|>"  # not what stopped it


def test_stop_string_drops_the_rest_and_tells_the_engine() -> None:
    ids = TOKENIZER.encode("the cat sat on the mat")
    bench = Bench()
    request = bench.submit(stop=["sat"], logprobs=1)
    wire = bench.ids(request)[0]
    bench.feed(*(step([(wire, t)], {wire: RequestExtra(logprobs=columns([t]))}) for t in ids))
    (delta,) = request.take()
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("the cat ", "stop", "sat")
    assert "sat" in TOKENIZER.decode(delta.token_ids)
    assert "sat" not in TOKENIZER.decode(delta.token_ids[:-1])
    assert delta.logprobs is not None and len(delta.logprobs) == len(delta.token_ids) < len(ids)
    assert bench.client.aborted == [wire] and bench.processor.num_unfinished == 0
    bench.feed(step([(wire, 9)], {wire: finish("abort")}))  # late news of a dead request
    assert request.take() == []
    assert [c[0] for c in bench.observer.calls] == ["arrival", "first", "finish"]
    assert bench.observer.calls[1][2] == len(delta.token_ids)


@pytest.mark.parametrize("ended", [False, True])
def test_a_repetition_drops_the_rest_and_tells_the_engine(ended: bool) -> None:
    bench = Bench()
    detection = RepetitionDetection(max_pattern_size=2, min_count=3)
    request = bench.submit(repetition_detection=detection, logprobs=0)
    [wire] = bench.ids(request)
    tokens = [70, 71, 72, 71, 72, 71, 72, 73, 74]
    scores = LogprobColumns.pack(np.array(tokens)[:, None], np.zeros((9, 1)), np.ones(9))
    extra = RequestExtra(finish_reason="stop" if ended else None, logprobs=scores)
    bench.feed(step([(wire, token) for token in tokens], {wire: extra}))
    [delta] = request.take()
    assert delta.token_ids == tokens[:7] and len(delta.logprobs or ()) == 7
    assert delta.text == TOKENIZER.decode(tokens[:7])
    assert (delta.finish_reason, delta.stop_reason) == ("repetition", None)
    assert bench.client.aborted == ([] if ended else [wire])
    assert request.finished


def test_stop_string_in_the_engines_last_step_needs_no_abort() -> None:
    ids = TOKENIZER.encode("the cat sat")
    bench = Bench()
    request = bench.submit(stop=["cat"])
    wire = bench.ids(request)[0]
    bench.feed(step([(wire, t) for t in ids], {wire: finish("length")}))
    (delta,) = request.take()
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("the ", "stop", "cat")
    assert bench.client.aborted == []


def test_detokenize_off_makes_no_text() -> None:
    bench = Bench()
    request = bench.submit(detokenize=False)
    wire = bench.ids(request)[0]
    bench.feed(step([(wire, 300), (wire, 10**6)], {wire: finish()}))
    (delta,) = request.take()
    assert (delta.text, delta.token_ids) == ("", [300, 10**6])


def test_logprobs_and_prompt_logprobs() -> None:
    bench = Bench()
    request = bench.submit(logprobs=2, prompt_logprobs=1)
    wire = bench.ids(request)[0]
    bench.feed(step([], {wire: RequestExtra(prompt_logprobs=columns([6]))}))  # one chunk a step
    assert request.take() == []
    extra = RequestExtra(
        prompt_logprobs=columns([7]), logprobs=columns([9], 2), num_cached_tokens=2
    )
    bench.feed(step([(wire, 9)], {wire: extra}))
    bench.feed(step([(wire, 11)], {wire: finish(logprobs=columns([11], 2))}))
    gathered = Gathered(request, TOKENIZER)
    gathered.add(request.take())
    output = gathered.output()
    assert output.finished and output.num_cached_tokens == 2
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(entry or {}) for entry in output.prompt_logprobs[1:]] == [[6], [7]]
    (one,) = output.outputs
    assert one.logprobs is not None
    assert [list(entry) for entry in one.logprobs] == [[9, 10], [11, 12]]
    assert one.cumulative_logprob == -20.0
    assert one.logprobs[0][10].rank == 2
    assert one.logprobs[0][9].decoded_token == TOKENIZER.token_str(9)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("server_is_overloaded", OverloadedError),
        ("numerical_error", NumericalError),
        ("server_error", EngineError),
        ("engine_restarted", EngineDeadError),
        ("integer_above_max_value", RequestError),
    ],
)
def test_an_error_ends_all_continuations(code: str, kind: type[LLMServeError]) -> None:
    bench = Bench()
    request, other = bench.submit(n=2), bench.submit()
    a, b = bench.ids(request)
    wire = bench.ids(other)[0]
    bench.feed(step([(wire, 5)], {a: finish("error", error=code, message="it broke")}))
    with pytest.raises(kind, match="it broke") as caught:
        request.take()
    assert caught.value.code == (kind.code or code if kind is not EngineError else None)
    assert bench.client.aborted == [b]  # the engine ended a by itself
    assert request.finished and other.take()[0].token_ids == [5]


def test_a_failure_of_ours_fails_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bad, good = bench.submit(n=2), bench.submit()
    a, b = bench.ids(bad)
    wire = bench.ids(good)[0]

    def broken(ids: list[int]) -> int:
        raise ZeroDivisionError

    text = bad.unfinished[b].text
    assert text is not None
    monkeypatch.setattr(text, "feed", broken)
    bench.feed(step([(a, 5), (b, 6), (wire, 7)]))
    with pytest.raises(EngineError):
        bad.take()
    assert sorted(bench.client.aborted) == [a, b]
    assert good.take()[0].token_ids == [7] and not good.finished


def test_abort_forgets_and_tells_the_engine_once() -> None:
    bench = Bench()
    request = bench.submit(n=2)
    wires = bench.ids(request)
    bench.processor.abort(request)
    bench.processor.abort(request)
    assert bench.client.aborted == wires and request.finished
    assert bench.processor.num_unfinished == 0
    bench.feed(step([(wires[0], 5)]))
    assert request.take() == []
    assert [c[0] for c in bench.observer.calls] == ["arrival", "arrival", "finish", "finish"]
    assert bench.observer.calls[-1][1].finish_reason == "abort"


def test_engine_death_fails_everything() -> None:
    bench = Bench()
    requests = [bench.submit(), bench.submit(n=2)]
    bench.processor.fail_all(EngineDeadError("gone"))
    for request in requests:
        with pytest.raises(EngineDeadError, match="gone"):
            request.take()
        assert request.finished
    assert bench.processor.num_unfinished == 0


def test_timings_reach_the_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.0, 104.0, 106.0])
    monkeypatch.setattr(output_processor.time, "monotonic", lambda: next(clock))
    bench = Bench()
    request = bench.submit(max_tokens=9)
    wire = bench.ids(request)[0]
    first = RequestExtra(num_cached_tokens=2, queue_time=0.5)
    bench.feed(step([(wire, 5)], {wire: first}))
    bench.feed(step([(wire, 6)]), step([(wire, 7)]))
    bench.feed(step([(wire, 8)], {wire: finish(num_preemptions=3)}, SchedulerStats(num_running=4)))
    assert [(name, count) for name, _, count in bench.observer.calls] == [
        ("arrival", 0), ("first", 1), ("tokens", 2), ("tokens", 1), ("finish", 0)
    ]  # fmt: skip
    timings = bench.observer.calls[0][1]
    assert timings == RequestTimings(
        arrival=100.0,
        num_prompt_tokens=3,
        max_tokens=9,
        n=1,
        queue_time=0.5,
        first_token=103.0,
        last_token=106.0,
        finish=106.0,
        num_cached_tokens=2,
        num_generation_tokens=4,
        num_preemptions=3,
        finish_reason="length",
    )
    assert (request.num_cached_tokens, request.num_preemptions) == (2, 3)
    assert bench.processor.stats.num_running == 4
