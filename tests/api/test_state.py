# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Phases, names, and what ends a request early."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmserve.api.errors import ClientGone, HttpError
from llmserve.api.state import AppState
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineLost, EngineReady
from llmserve.errors import EngineDeadError, NotFoundError, OverloadedError, RequestError
from llmserve.metrics.board import Board
from tests.helpers.api import MODEL, ScriptedEngine, make_llm


def receiver(gone: asyncio.Event) -> Any:
    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def test_phases() -> None:
    state, engine = AppState(ServerConfig()), ScriptedEngine()
    with pytest.raises(OverloadedError) as info:
        state.engine()
    assert info.value.code == "starting"
    llm = make_llm(engine)
    state.attach(llm)
    assert state.engine() is llm and llm.observer is state.stats
    engine.die()
    await asyncio.sleep(0.01)
    with pytest.raises(EngineDeadError):
        state.engine()
    state.phase = "draining"
    with pytest.raises(OverloadedError) as info:
        state.engine()
    assert info.value.code == "draining"
    llm.shutdown()
    engine.close()


async def test_an_engine_that_is_late_or_lost_takes_nothing_for_a_while() -> None:
    state, engine = AppState(ServerConfig(engine_hang_timeout=5)), ScriptedEngine()
    llm = make_llm(engine)
    state.attach(llm)
    engine.heartbeat.overdue = 6.0
    with pytest.raises(OverloadedError) as info:
        state.engine()
    assert info.value.code == "engine_hung" and info.value.retry_after > 1
    engine.heartbeat.overdue = 4.0
    assert state.engine() is llm
    engine.push(EngineLost("gone", 1))
    await asyncio.sleep(0.01)
    with pytest.raises(OverloadedError) as info:
        state.engine()
    assert info.value.code == "engine_dead" and not state.engine_is_dead
    engine.push(EngineReady(llm.model, 1))
    await asyncio.sleep(0.01)
    assert state.engine() is llm
    engine.push(EngineReady(llm.model, 2))  # what was said of the loss did not arrive
    await asyncio.sleep(0.01)
    assert state.engine() is llm and engine.engine == 2
    assert "llmserve:engine_restarts_total" in state.metrics.render().decode()
    llm.shutdown()
    engine.close()


async def test_an_engine_that_comes_up_during_the_drain_takes_nothing() -> None:
    state, engine = AppState(ServerConfig()), ScriptedEngine()
    state.phase = "draining"
    state.attach(make_llm(engine))
    with pytest.raises(OverloadedError):
        state.engine()
    assert state.llm is not None
    state.llm.shutdown()
    engine.close()


async def test_places_are_counted_over_all_servers(tmp_path: Path) -> None:
    config, path = ServerConfig(api_key=["a", "b"], max_requests_per_key=3), str(tmp_path / "board")
    one, two = (AppState(config, board=Board(path, slot, 2)) for slot in (0, 1))
    engines = [ScriptedEngine(), ScriptedEngine()]
    for state, scripted in zip((one, two), engines, strict=True):
        state.attach(make_llm(scripted))
        assert state.llm is not None
        state.llm.model.max_num_seqs, state.llm.model.max_num_queued_reqs = 2, 2
    one.take_place(0)
    two.take_place(0)
    two.take_place(0)
    for state in (one, two):
        with pytest.raises(HttpError) as info:
            state.take_place(0)
        assert info.value.status == 429
        state.check_place(1)
    one.take_place(1)
    for state in (one, two):
        with pytest.raises(OverloadedError, match="Too many requests"):
            state.check_place(1)
        with pytest.raises(OverloadedError, match="Too many requests"):
            state.take_place(1)
    two.leave_place(0)
    one.check_place(0)
    Board(path, num_keys=2).replace(1)  # the other server is lost
    assert [one.board.places(key) for key in (0, 1)] == [1, 1]
    for state, scripted in zip((one, two), engines, strict=True):
        assert state.llm is not None
        state.llm.shutdown()
        scripted.close()


def test_names() -> None:
    state = AppState(ServerConfig(), ["a", "b/c"])
    assert [state.resolve_model(name) for name in (None, "a", "b/c")] == ["a", "a", "b/c"]
    with pytest.raises(NotFoundError) as info:
        state.resolve_model(MODEL)
    assert info.value.code == "model_not_found" and "b/c" in info.value.message
    with pytest.raises(RequestError):
        AppState(ServerConfig()).resolve_model(None)


async def test_watched_returns_what_work_returns() -> None:
    state = AppState(ServerConfig())

    async def work() -> int:
        assert state.num_running == 1 and not state.idle.is_set()
        return 5

    assert await state.watched(receiver(asyncio.Event()), work()) == 5
    assert state.num_running == 0 and state.idle.is_set()


async def test_watched_ends_with_its_client_with_cut_and_with_its_caller() -> None:
    state, gone = AppState(ServerConfig()), asyncio.Event()
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    def start(gone: asyncio.Event) -> asyncio.Task[None]:
        return asyncio.ensure_future(state.watched(receiver(gone), work()))

    leaving, cut, cancelled = start(gone), start(asyncio.Event()), start(asyncio.Event())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    gone.set()
    with pytest.raises(ClientGone):
        await leaving
    state.cut(OverloadedError("over", code="draining"))
    with pytest.raises(OverloadedError, match="over"):
        await cut
    assert len(ended) == 3 and state.num_running == 0
