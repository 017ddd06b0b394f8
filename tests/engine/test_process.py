# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The engine in a process of its own, spoken to as the API server does."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from llmserve.core.messages import (
    AbortRequests,
    Clients,
    EngineOutputs,
    SchedulerStats,
    UtilityCall,
    UtilityResult,
)
from llmserve.engine import client as client_module
from llmserve.engine import process as process_module
from llmserve.engine.channel import Codec, engine_address, push_socket
from llmserve.engine.client import EngineClient
from llmserve.engine.launch import SUPERVISOR, EngineProcess, launch_engine
from llmserve.engine.process import EngineCoreProc, Shutdown
from tests.helpers.fake_engine import Listener, fake_config, request


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    config = fake_config(tmp_path_factory.mktemp("model"), fake={"delay": 0.002})
    process = launch_engine(config, num_clients=2)
    yield process
    process.shutdown()
    assert not process.alive()
    assert not Path(process.run_dir).exists()


def test_what_is_too_large_for_one_message_comes_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of one step, each within its limit, had more than a client's socket takes."""
    path = tmp_path / "sitecustomize.py"
    path.write_text(
        "import llmserve.engine.channel as channel\n"
        "channel.MAX_FROM_ENGINE_BYTES = 1 << 20\nchannel._PART_BYTES = 1 << 17\n"
    )
    monkeypatch.setattr(client_module, "MAX_FROM_ENGINE_BYTES", 1 << 20)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = launch_engine(fake_config(tmp_path, max_num_batched_tokens=2048))
    client = process.connect(0)
    try:
        process.wait_ready(client)
        for wire_id in range(8):  # 1.6 MB in one step
            client.send(request(0, wire_id, [5] * 200, prompt_logprobs=128, max_tokens=2))
        one = Listener(client).until(lambda it: all(it.finished(i) for i in range(8)))
        for extras in one.extras.values():
            assert sum(it.prompt_logprobs.n for it in extras if it.prompt_logprobs) == 199
    finally:
        client.close()
        process.shutdown()


@pytest.fixture(scope="module")
def listeners(engine: EngineProcess) -> Iterator[list[Listener]]:
    clients = [engine.connect(0), engine.connect(1)]
    for client in clients:
        info = engine.wait_ready(client)
        assert (info.logits_width, info.max_model_len) == (1000, 512)
    yield [Listener(client) for client in clients]
    for client in clients:
        client.close()


def _stats(listener: Listener) -> SchedulerStats:
    call = len(listener.other) + 1000
    listener.client.send(UtilityCall(listener.client.index, call, "stats"))
    listener.until(
        lambda it: any(isinstance(m, UtilityResult) and m.call_id == call for m in it.other)
    )
    (value,) = [
        m.value for m in listener.other if isinstance(m, UtilityResult) and m.call_id == call
    ]
    return msgspec.convert(value, SchedulerStats)


def test_clients_hear_their_own_requests_alone(listeners: list[Listener]) -> None:
    one, two = listeners
    one.client.send(request(0, 1, [5, 6, 7]))
    two.client.send(request(1, 1, [5, 6, 7, 8], max_tokens=5))
    one.until(lambda it: it.finished(1))
    two.until(lambda it: it.finished(1))
    assert (len(one.tokens[1]), len(two.tokens[1])) == (8, 5)
    assert one.tokens[1][0] != two.tokens[1][0]
    stats = _stats(one)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total


def test_abort_frees_and_is_answered(listeners: list[Listener]) -> None:
    one = listeners[0]
    one.client.send(request(0, 2, [9] * 40, max_tokens=400))
    one.until(lambda it: len(it.tokens.get(2, [])) > 3)
    one.client.send(AbortRequests(0, [2, 12345]))
    one.until(lambda it: it.finished(2))
    assert one.finished(2) == "abort"
    assert _stats(one).num_running == 0


def test_bad_token_ids_are_refused_for_that_request_alone(listeners: list[Listener]) -> None:
    one = listeners[0]
    one.client.send(request(0, 3, [5, 1000]))
    one.client.send(request(0, 4, [5, -1]))
    one.client.send(request(0, 5, [5, 6, 7]))
    one.until(lambda it: all(it.finished(i) for i in (3, 4, 5)))
    assert [one.finished(i) for i in (3, 4, 5)] == ["error", "error", "length"]
    assert one.tokens[5] == one.tokens[1]


def test_garbage_and_strangers_are_dropped(
    engine: EngineProcess, listeners: list[Listener]
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    push = push_socket(context, engine_address(engine.run_dir), 500)
    for data in (
        b"",
        b"cos\nsystem\n(S'id'\ntR.",
        b"\x93" * 4000,
        b"\x91\xa3req",
        b"\xc1" * 100,
        b"\x91\xa3\xce\xff\xff",  # no UTF-8
        b"\x91" * 100_000,
    ):
        push.send(data)
    hostile = request(0, 8, [1])
    hostile.params.temperature = -1.0
    push.send(Codec().encode(hostile))
    context.destroy(linger=500)
    one = listeners[0]
    one.client.send(request(7, 6, [1]))  # no such client
    one.client.send(request(0, 7, [5, 6, 7]))
    one.until(lambda it: it.finished(7))
    assert one.tokens[7] == one.tokens[1]
    assert engine.alive()


def test_unknown_utility_is_answered(listeners: list[Listener]) -> None:
    one = listeners[0]
    one.client.send(UtilityCall(0, 77, "no_such_thing"))
    one.until(lambda it: any(isinstance(m, UtilityResult) and m.call_id == 77 for m in it.other))
    (result,) = [m for m in one.other if isinstance(m, UtilityResult) and m.call_id == 77]
    assert result.error is not None
    assert "no_such_thing" in result.error


def test_a_client_that_goes_takes_its_requests_with_it(
    engine: EngineProcess, listeners: list[Listener]
) -> None:
    supervisor, gone = listeners
    gone.client.send(request(1, 9, [9] * 40, max_tokens=400))
    gone.until(lambda it: len(it.tokens.get(9, [])) > 3)
    gone.client.send(Clients(1, [0, 1, 2]))  # it is not the supervisor
    engine.clients[:] = [0, 2, 3]
    new = engine.connect(2), engine.connect(3)
    supervisor.client.send(Clients(0, engine.clients))
    for client in new:
        engine.wait_ready(client)
    gone.client.send(request(1, 10, [5, 6, 7]))
    one, other = (Listener(client) for client in new)
    stats = _stats(one)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total
    one.client.send(request(2, 1, [5, 6, 7]))
    one.until(lambda it: it.finished(1))
    assert one.tokens == {1: supervisor.tokens[1]}
    other.until(
        lambda it: any(isinstance(m, SchedulerStats) and not m.num_running for m in it.other)
    )
    assert not other.tokens and not other.extras
    for client in new:
        client.close()


class _AbortedInFlight:
    """An EngineCore whose one request is aborted while its step runs; it then has no news."""

    grammars = None
    heartbeat = None

    def __init__(self) -> None:
        self.news = [{1: EngineOutputs(ids=bytes(4), tokens=bytes(4))}, {1: EngineOutputs()}, {}]
        self.num_running = [1, 0, 0]

    @property
    def has_work(self) -> bool:
        return bool(self.news)

    def release_held(self) -> None:
        if not self.news:
            raise Shutdown

    def step(self) -> None:
        self.stats_now = SchedulerStats(num_running=self.num_running.pop(0))

    def take_outputs(self) -> dict[int, EngineOutputs]:
        return self.news.pop(0)

    def stats(self) -> SchedulerStats:
        return self.stats_now


def test_all_clients_hear_that_nothing_runs_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "_TELL_S", 1e9)
    monkeypatch.setattr(process_module, "IDLE_BEAT_S", 0.0)
    clients = [EngineClient(str(tmp_path), index) for index in range(3)]
    proc = EngineCoreProc(str(tmp_path), range(3))
    proc._told = time.monotonic()
    core: Any = _AbortedInFlight()
    with pytest.raises(Shutdown):
        proc.run(core)
    listeners = [Listener(client) for client in clients]
    for listener in listeners[1:]:
        listener.until(lambda it: it.other and it.other[-1].num_running == 0)
    assert not listeners[SUPERVISOR].other
    proc.close()
    for client in clients:
        client.close()


def test_sigterm_ends_it_with_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with nothing frozen: what then still is would be printed by libraries as lost."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, gc, pathlib\n"
        f"path = pathlib.Path({str(tmp_path / 'frozen')!r})\n"
        "atexit.register(lambda: path.write_text(str(gc.get_freeze_count())))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = launch_engine(fake_config(tmp_path))
    client = process.connect(0)
    process.wait_ready(client)
    process.child.process.send_signal(signal.SIGTERM)
    assert process.child.process.wait(5) == 0
    assert (tmp_path / "frozen").read_text() == "0"
    client.close()
    process.shutdown()
