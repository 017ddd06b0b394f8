# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import signal
from pathlib import Path

import pytest

from llmserve.core.messages import EngineFailed, EngineLost, EngineReady
from llmserve.engine.launch import launch_engine
from llmserve.errors import ConfigError, EngineError
from tests.helpers.fake_engine import Listener, fake_config, request


def test_what_the_user_got_wrong_is_a_config_error(tmp_path: Path) -> None:
    config = fake_config(tmp_path, max_model_len=513)
    process = launch_engine(config)
    client = process.connect(0)
    with pytest.raises(ConfigError, match="--max-model-len 513.*512"):
        process.wait_ready(client)
    assert process.child.process.wait(5) == 2
    client.close()
    process.shutdown()
    assert not Path(process.run_dir).exists()


def test_death_while_starting_is_an_engine_error(tmp_path: Path) -> None:
    process = launch_engine(fake_config(tmp_path))
    client = process.connect(0)
    process.child.process.kill()
    with pytest.raises(EngineError, match="exit code -9"):
        process.wait_ready(client)
    client.close()
    process.shutdown()


def test_death_is_announced_to_every_client(tmp_path: Path) -> None:
    process = launch_engine(fake_config(tmp_path, fake={"delay": 0.01}), num_clients=2)
    listeners = [Listener(process.connect(0)), Listener(process.connect(1))]
    for listener in listeners:
        process.wait_ready(listener.client)
    listeners[0].client.send(request(0, 1, [5], max_tokens=300))
    listeners[0].until(lambda it: it.tokens)
    process.child.process.send_signal(signal.SIGKILL)
    process.child.process.wait(5)
    process.announce_death()
    for listener in listeners:
        listener.until(lambda it: any(isinstance(m, EngineFailed) for m in it.other))
        listener.client.close()
    process.shutdown()


def test_the_next_engine_hears_nothing_that_was_meant_for_the_last(tmp_path: Path) -> None:
    process = launch_engine(fake_config(tmp_path, fake={"delay": 0.01}))
    listener = Listener(process.connect(0))
    process.wait_ready(listener.client)
    listener.client.send(request(0, 1, [5], max_tokens=300))
    listener.until(lambda it: it.tokens)
    first = process.child.process.pid
    process.child.process.send_signal(signal.SIGSTOP)
    listener.client.send(request(0, 2, [5]))  # lost with the engine
    process.restart()
    process.announce(EngineLost("why", process.number))
    listener.until(lambda it: any(isinstance(m, EngineLost) for m in it.other))
    listener.client.reconnect(process.number)
    listener.client.send(request(0, 3, [5], max_tokens=4))  # before it is ready
    listener.until(lambda it: it.finished(3))
    ready = [m for m in listener.other if isinstance(m, EngineReady)]
    assert [m.engine for m in ready] == [1]
    assert len(listener.tokens[3]) == 4 and not listener.finished(2)
    assert process.child.process.pid != first
    assert listener.client.heartbeat.num_steps > 0
    assert {path.name for path in Path(process.run_dir).iterdir()} == {
        "client-0.sock", "engine-1.sock", "heartbeat-1"
    }  # fmt: skip
    listener.client.close()
    process.shutdown()


def test_who_is_interrupted_while_it_ends_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = launch_engine(fake_config(tmp_path))
    wait, waits = process.child.process.wait, []

    def interrupted(timeout: float | None = None) -> int:
        waits.append(timeout)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(process.child.process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.shutdown()
    assert process.child.process.returncode is not None
    assert not Path(process.run_dir).exists()
