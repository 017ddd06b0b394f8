# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Scheduler, one behaviour at a time; what they do together is in test_scheduler_simulation.py."""

import time

import numpy as np
import pytest

from benchmarks.engine_step import LONG, SHORT, measure
from llmserve.core.messages import EngineRequest
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmserve.errors import RequestError
from tests.helpers.simulation import Episode, World


def _episode(**world: object) -> Episode:
    return Episode(World(**world), 0)  # type: ignore[arg-type]


def _send(episode: Episode, prompt: list[int], priority: int = 0, **params: object) -> int:
    fields = {"ignore_eos": True, "seed": 3, "extra_args": {"content": 0}} | params
    return episode.send(0, prompt, SamplingParams(**fields), 0, priority)[1]  # type: ignore[arg-type]


def _message(prompt: list[int], wire_id: int = 1, **params: object) -> EngineRequest:
    return EngineRequest(
        client=4, request_id=wire_id, prompt=np.array(prompt, np.int32).tobytes(),
        params=SamplingParams(**params), arrival=0.0,  # type: ignore[arg-type]
    )  # fmt: skip


def _plan(episode: Episode) -> SchedulerOutput:
    plan = episode.scheduler.schedule()
    assert plan is not None
    episode.in_flight.append((plan, episode.worker.execute(plan)))
    return plan


def _commit(episode: Episode) -> None:
    episode.scheduler.commit(*episode.in_flight.popleft())
    episode.deliver(episode.scheduler.take_outputs())


# -- who is let in


def test_an_id_that_is_in_use_changes_nothing() -> None:
    scheduler = _episode().scheduler
    scheduler.add(_message([1, 2]))
    scheduler.add(_message([3]))
    assert scheduler.take_outputs() == {}
    assert (scheduler.stats().num_waiting, scheduler.stats().num_dropped_events) == (1, 1)


def test_nothing_to_generate() -> None:
    episode = _episode(scheduler={"max_num_batched_tokens": 8})
    ids = [
        _send(episode, [1] * 20, max_tokens=0),
        _send(episode, [5], max_tokens=0, prompt_logprobs=0),
        _send(episode, list(range(20)), max_tokens=0, prompt_logprobs=0),
    ]
    episode.deliver(episode.scheduler.take_outputs())
    assert [episode.sent[0, i].finish for i in ids] == ["length", "length", None]
    episode.drain()
    assert episode.sent[0, ids[2]].scored == list(range(1, 20))
    assert episode.counts["num_tokens_computed"] == 19


def test_a_held_request_waits_outside_the_queue_until_it_is_released() -> None:
    episode = _episode(scheduler={"max_num_queued_reqs": 2})
    scheduler = episode.scheduler
    scheduler.add(_message([1, 2], 1, max_tokens=1), hold=True)
    assert not scheduler.has_unfinished() and scheduler.schedule() is None
    assert scheduler.stats().num_waiting == 1
    scheduler.add(_message([1, 2], 2), hold=True)
    scheduler.add(_message([1, 2], 3))
    assert scheduler.take_outputs()[4].extras[3].error == "server_is_overloaded"
    scheduler.check_integrity()
    key = 4 << 32 | 1
    for _ in range(2):
        scheduler.release(key)
    assert scheduler.has_unfinished() and scheduler.held == {key + 1: 2}
    plan = scheduler.schedule()
    assert plan is not None and [len(new.token_ids) for new in plan.new_requests] == [2]


@pytest.mark.parametrize("end", ["abort", "fail"])
def test_a_held_request_may_end(end: str) -> None:
    scheduler = _episode().scheduler
    scheduler.add(_message([1, 2]), hold=True)
    if end == "abort":
        scheduler.abort(4, 1)
    else:
        scheduler.fail(4 << 32 | 1, RequestError("no grammar"))
        scheduler.fail(4 << 32 | 1, RequestError("said already"))
    scheduler.release(4 << 32 | 1)
    extra = scheduler.take_outputs()[4].extras[1]
    assert extra.finish_reason == ("abort" if end == "abort" else "error")
    assert extra.message == (None if end == "abort" else "no grammar")
    assert not scheduler.requests and not scheduler.held
    scheduler.check_integrity()


# -- what a step holds


def test_decodes_first_then_prompts_by_budget() -> None:
    episode = _episode(scheduler={"max_num_batched_tokens": 10}, depth=1, caching=False)
    _send(episode, [1, 2, 3])
    assert _plan(episode).num_scheduled.tolist() == [3]
    _commit(episode)
    _send(episode, [4] * 25)
    _send(episode, [5] * 4)
    shapes = []
    for _ in range(4):
        plan = _plan(episode)
        shapes.append((plan.num_scheduled.tolist(), plan.sample.tolist()))
        _commit(episode)
    assert shapes == [
        ([1, 9], [True, False]),
        ([1, 9], [True, False]),
        ([1, 7, 2], [True, True, False]),
        ([1, 1, 2], [True, True, True]),
    ]
    assert episode.scheduler.stats().num_chunked_prefills == 2
    episode.drain()


def test_whole_prompts_wait_for_a_step_that_holds_them() -> None:
    flags = {"max_num_batched_tokens": 20, "enable_chunked_prefill": False}
    episode = _episode(scheduler=flags, depth=1, caching=False)
    for length in (12, 9, 8):
        _send(episode, [length] * length, max_tokens=1)
    counts = []
    while episode.scheduler.has_unfinished():
        counts.append(_plan(episode).num_scheduled.tolist())
        _commit(episode)
    assert counts == [[12], [9, 8]]


def test_row_budget() -> None:
    episode = _episode(scheduler={"max_num_seqs": 3}, depth=1)
    for i in range(8):
        _send(episode, [i + 1], max_tokens=4)
    rows = []
    while episode.scheduler.has_unfinished():
        rows.append(_plan(episode).num_rows)
        _commit(episode)
    assert rows == [3] * 4 + [3] * 4 + [2] * 4


def test_short_requests_start_by_priority() -> None:
    flags = {"max_num_seqs": 1, "scheduling_policy": "priority"}
    episode = _episode(scheduler=flags)
    ids = [
        _send(episode, [7, i], priority, max_tokens=1) for i, priority in enumerate((2, 0, 1, 0))
    ]
    order: list[int] = []
    while episode.scheduler.has_unfinished():
        episode.step()
        order += [i for i in ids if episode.sent[0, i].finish and i not in order]
    assert order == [ids[1], ids[3], ids[2], ids[0]]


# -- steps in flight


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_row_is_planned_past_the_last_token(depth: int) -> None:
    episode = _episode(depth=depth)
    _send(episode, [1, 2], max_tokens=5)
    while episode.scheduler.has_unfinished():
        episode.step(patient=True)
    episode.drain()
    assert episode.counts["num_tokens_computed"] == 2 + 4
    assert episode.counts["num_wasted_tokens"] == 0
    assert episode.counts["max_in_flight"] == depth


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_is_seen_one_step_late_each(depth: int) -> None:
    episode = _episode(depth=depth)
    key = _send(episode, [1, 2], max_tokens=30)
    tokens, _ = episode.solo(episode.sent[0, key])
    stop = tokens[9]
    key = _send(episode, [1, 2], max_tokens=30, stop_token_ids=[stop])
    episode.scheduler.abort(0, 1)
    while episode.scheduler.has_unfinished():
        episode.step(patient=True)
    sent = episode.sent[0, key]
    assert (sent.finish, sent.tokens) == ("stop", tokens[: tokens.index(stop) + 1])
    assert episode.scheduler.stats().num_wasted_tokens == depth - 1


def test_results_of_an_aborted_row_are_dropped_and_its_blocks_free_at_once() -> None:
    episode = _episode(depth=2)
    key = _send(episode, [1] * 10)
    other = _send(episode, [2] * 10, max_tokens=6)
    _plan(episode)
    _plan(episode)
    episode.scheduler.abort(0, key)
    assert episode.scheduler.stats().num_running == 1
    assert episode.scheduler.kv.pool.num_available == episode.kv.num_blocks - 1 - 3
    _commit(episode)
    _commit(episode)
    assert episode.scheduler.stats().num_late_results == 2
    episode.drain()
    assert episode.sent[0, key].finish == "abort" and not episode.sent[0, key].tokens
    assert len(episode.sent[0, other].tokens) == 6


def test_unknown_aborts_are_counted() -> None:
    scheduler = _episode().scheduler
    scheduler.abort(3, 9)
    assert scheduler.stats().num_dropped_events == 1 and not scheduler.take_outputs()


# -- memory


@pytest.mark.parametrize("model", ["full", "window"])
def test_sixteen_growing_requests_in_the_room_of_one(model: str) -> None:
    flags = {"max_num_seqs": 16, "max_num_batched_tokens": 64}
    episode = _episode(model=model, room=1.2, scheduler=flags)
    for i in range(16):
        _send(episode, [i + 1] * 4, max_tokens=55)
    episode.drain()
    assert episode.counts["length"] == 16
    assert episode.counts["num_preemptions"] > 10
    assert episode.counts["max preemptions"] <= 8


def test_the_oldest_is_never_preempted() -> None:
    episode = _episode(room=1.0, scheduler={"max_num_seqs": 8})
    oldest = _send(episode, [9] * 4, max_tokens=59)
    request = episode.scheduler.requests[oldest]
    for i in range(7):
        _send(episode, [i + 1] * 4, max_tokens=40)
    while request.finish_reason is None:
        episode.step()
    assert request.num_preemptions == 0
    assert episode.scheduler.stats().num_preemptions > 0
    episode.drain()


def test_children_of_one_prompt_compute_it_once() -> None:
    """They arrive together: the first computes, the others wait a step and share."""
    prompt = list(range(1, 42))
    episode = _episode(scheduler={"max_num_seqs": 8}, depth=1, room=6.0)
    for seed in range(6):
        _send(episode, prompt, max_tokens=2, seed=seed)
    rows = [_plan(episode).num_rows]
    _commit(episode)
    rows.append(_plan(episode).num_rows)
    _commit(episode)
    rows.append(_plan(episode).num_rows)
    _commit(episode)
    assert rows == [1, 1, 6], "the prompt takes two steps of 32 and 9 tokens"
    episode.drain()
    assert episode.counts["prefix_hits"] == 5 * 40
    assert episode.counts["num_tokens_computed"] == 41 + 5 * 1 + 6


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_window_that_was_passed_in_flight_is_still_found(depth: int) -> None:
    """The head of a long prompt is a hit although the prompt itself no longer reads it."""
    head = list(range(1, 25))
    episode = _episode(model="window", depth=depth, room=4.0)
    _send(episode, [*head, *[50] * 30], max_tokens=8)
    while episode.scheduler.has_unfinished():
        episode.step(patient=True)
    _send(episode, [*head, 60, 61], max_tokens=2)
    episode.drain()
    assert episode.counts["prefix_hits"] == 24


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_a_prompt_has_passed_is_free_once_it_is_computed(depth: int) -> None:
    """Not only where its output needs a block."""
    episode = _episode(model="window", depth=depth, room=4.0)
    _send(episode, list(range(1, 30)), max_tokens=8)
    pool = episode.scheduler.kv.pool
    for _ in range(depth):
        _plan(episode)
        assert pool.num_blocks - 1 - pool.num_available == 3 * 8
    _commit(episode)
    # the query at 29 reads from 24 and from 19 on
    assert pool.num_blocks - 1 - pool.num_available == 8 + 2 + 4
    episode.drain()


def test_reset_prefix_cache_only_while_nothing_runs() -> None:
    episode = _episode(depth=1)
    _send(episode, [1] * 20, max_tokens=2)
    _plan(episode)
    assert not episode.scheduler.reset_prefix_cache()
    _commit(episode)
    episode.drain()
    assert episode.scheduler.stats().num_blocks_cached == 5
    assert episode.scheduler.reset_prefix_cache()
    stats = episode.scheduler.stats()
    assert (stats.num_blocks_cached, stats.num_blocks_free) == (0, stats.num_blocks_total)


def test_several_drafts_at_a_time_give_the_same_text() -> None:
    plain, drafted = _episode(depth=1), _episode(depth=1, num_drafts=3)
    for episode in (plain, drafted):
        for i in range(5):
            _send(episode, [i + 1] * 7, max_tokens=30)
        episode.drain()
    assert [s.tokens for s in plain.sent.values()] == [s.tokens for s in drafted.sent.values()]
    assert drafted.counts["accepted drafts"] > 40
    assert drafted.counts["steps"] < 0.7 * plain.counts["steps"]


# -- cost


def test_cost_depends_on_neither_the_queue_nor_the_context() -> None:
    """Generous ratios of medians in one run; benchmarks/engine_step.py prints the real table."""
    base = measure(64, 0, SHORT, 150)
    assert measure(64, 10_000, SHORT, 150).p50 < 2 * base.p50
    assert measure(64, 0, LONG, 150).p50 < 2.5 * base.p50
    assert measure(256, 0, SHORT, 150).p50 < 3 * base.p50, "a loop over rows would be four times"


# -- deadlines


def _timed(prompt: list[int], wire_id: int, deadline: float) -> EngineRequest:
    message = _message(prompt, wire_id, max_tokens=30, ignore_eos=True, seed=1)
    message.deadline = deadline
    message.params.extra_args = {"content": 0}
    return message


def test_a_deadline_ends_a_request_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    episode = _episode(scheduler={"max_num_seqs": 2, "max_num_batched_tokens": 8})
    scheduler = episode.scheduler
    scheduler.add(_timed([1] * 4, 1, 101.0))  # will decode
    scheduler.add(_timed([2] * 30, 2, 102.0))  # will be in its prompt
    scheduler.add(_timed([3] * 4, 3, 103.0))  # will wait
    scheduler.add(_timed([4] * 4, 4, 0.0))
    told: dict[int, tuple[str | None, str | None]] = {}

    def step() -> None:
        plan = scheduler.schedule()
        if plan is not None:
            scheduler.commit(plan, episode.worker.execute(plan))
        for news in scheduler.take_outputs().values():
            for wire_id, extra in news.extras.items():
                if extra.finish_reason is not None:
                    told[wire_id] = extra.error, extra.finish_reason
        scheduler.check_integrity()

    step()
    step()
    assert scheduler.stats().num_running == 2 and not told
    now = 110.0
    scheduler.slots.free.clear()  # so that the third cannot start in the step that frees a slot
    step()
    assert told == {
        1: ("request_timeout", "error"),
        2: ("request_timeout", "error"),
        3: ("queue_timeout", "error"),
    }
    assert scheduler.stats().num_expired == 3
    while scheduler.has_unfinished():
        step()
    assert told[4] == (None, "length")
    assert scheduler.kv.pool.num_available == scheduler.kv.pool.num_blocks - 1


def test_deadlines_of_finished_requests_do_not_pile_up() -> None:
    scheduler = _episode().scheduler
    for wire_id in range(1000):
        scheduler.add(_timed([1], wire_id, 1e9))
        scheduler.abort(4, wire_id)
    assert len(scheduler._deadlines) < 100


def test_a_bug_in_admission_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = _episode().scheduler
    monkeypatch.setattr(scheduler._admission, "_check_pool", lambda request: 1 / 0)
    scheduler.add(_message([1, 2]))
    monkeypatch.undo()
    scheduler.add(_message([1, 2], 2))
    extras = scheduler.take_outputs()[4].extras
    assert extras[1].error == "server_error" and "division" not in (extras[1].message or "")
    assert list(extras) == [1] and scheduler.stats().num_waiting == 1


# -- tenants


def test_a_tenant_with_a_backlog_does_not_hold_up_another() -> None:
    episode = _episode(scheduler={"max_num_seqs": 4})
    scheduler = episode.scheduler

    def add(wire_id: int, tenant: int) -> None:
        message = _message([tenant + 1] * 3, wire_id, max_tokens=9, ignore_eos=True, seed=1)
        message.tenant, message.params.extra_args = tenant, {"content": 0}
        scheduler.add(message)

    def step() -> set[int]:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.commit(plan, episode.worker.execute(plan))
        scheduler.take_outputs()
        scheduler.check_integrity()
        slots = scheduler.slots
        return {scheduler._request_in(slot).wire_id for slot in slots.running.tolist()}

    add(0, 1)
    for _ in range(9):
        step()
    for wire_id in range(1, 30):
        add(wire_id, 0)
    assert step() == {1, 2, 3}  # the fourth place is kept
    add(99, 1)
    assert 99 in step()
    while scheduler.has_unfinished():
        step()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_place_that_is_kept_for_others_is_theirs_whose_turn_comes_later(policy: str) -> None:
    flags = {"max_num_seqs": 3, "scheduling_policy": policy}
    scheduler = _episode(scheduler=flags).scheduler
    for wire_id, tenant, length in ((1, 0, 3), (2, 0, 3), (3, 0, 3), (4, 1, 40), (5, 1, 3)):
        message = _message([tenant + 1] * length, wire_id, max_tokens=9)
        message.tenant, message.priority = tenant, tenant
        scheduler.add(message)
    scheduler.abort(4, 4)  # its turn is over, and the next of its tenant comes after all others
    scheduler.schedule()
    running = [scheduler._request_in(slot).wire_id for slot in scheduler.slots.running.tolist()]
    assert set(running) == {1, 2, 5} and len(scheduler.waiting) == 1
    scheduler.check_integrity()


def test_only_prompts_that_are_looked_up_are_queries() -> None:
    episode = _episode()
    for wire_id, scored in ((1, None), (2, 0)):
        message = _message([1, 2, 3, 4, 5, 6], wire_id, prompt_logprobs=scored)
        message.params.extra_args = {"content": 0}
        episode.scheduler.add(message)
    _plan(episode)
    assert episode.scheduler.stats().prefix_queries == 6
    episode.scheduler.kv.enable_caching = False
    episode.scheduler.add(_message([1, 2, 3, 4, 5, 6], 3))
    assert episode.scheduler.schedule() is not None
    assert episode.scheduler.stats().prefix_queries == 6


@pytest.mark.parametrize(("invalid", "corrupted"), [(1, 1), (2, 0)])
def test_logits_that_are_not_finite_are_counted(invalid: int, corrupted: int) -> None:
    episode = _episode(depth=1)
    episode.scheduler.add(_message([1, 2, 3]))
    plan = episode.scheduler.schedule()
    assert plan is not None
    output = ModelRunnerOutput(
        np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.array([invalid], np.int8)
    )
    episode.scheduler.commit(plan, output)
    assert episode.scheduler.stats().num_corrupted == corrupted
    assert not episode.scheduler.requests
