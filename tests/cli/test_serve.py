# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmserve.cli import serve as module
from llmserve.cli.serve import Supervisor, is_ready, listen, ready_block, run
from llmserve.config.server import ServerConfig
from llmserve.core.kv_spec import FullAttentionSpec
from llmserve.core.messages import EngineFailed, EngineReady
from llmserve.errors import ConfigError
from llmserve.utils import heartbeat
from llmserve.utils.heartbeat import Heartbeat
from tests.helpers.clock import Clock
from tests.helpers.frontend import model_info

INFO = model_info(kv_specs=[FullAttentionSpec(2, 16, 4)] * 2, tokenizer="t", chat_template="c")


def test_a_taken_port_is_one_line() -> None:
    with listen(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already"
        ):
            listen(ServerConfig(port=port))


def test_unknown_host_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 203.0.113.1:8000"):
        listen(ServerConfig(host="203.0.113.1"))
    with pytest.raises(ConfigError, match="cannot listen on no.such.host.invalid:8000"):
        listen(ServerConfig(host="no.such.host.invalid"))


def test_unix_socket_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen(ServerConfig(uds=str(path))).close()
    with listen(ServerConfig(uds=str(path))) as sock:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert "--unix-socket" in ready_block(INFO, ServerConfig(uds=str(path)), sock)


def test_unix_socket_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.raises(ConfigError, match="precious"):
        listen(ServerConfig(uds=str(path)))
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("status", "ready"), [("200 OK", True), ("503 Service Unavailable", False)]
)
def test_ready_is_what_the_probe_answers(status: str, ready: bool) -> None:
    with listen(ServerConfig(host="0.0.0.0", port=0)) as sock:

        def answer() -> None:
            connection, _ = sock.accept()
            connection.recv(1000)
            connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert is_ready(sock) is ready
        thread.join()


def test_not_listening_is_not_ready() -> None:
    with listen(ServerConfig(port=0)) as sock:
        clone = socket.socket(sock.family, sock.type)
        clone.bind(("127.0.0.1", 0))
        assert not is_ready(clone)
        clone.close()


def test_ready_block_fits_the_model_and_the_server() -> None:
    with listen(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        chat = ready_block(INFO, ServerConfig(api_key=["secret"], root_path="/llm"), sock)
        text = ready_block(model_info(tokenizer="t", kv_specs=INFO.kv_specs), ServerConfig(), sock)
        ids = ready_block(model_info(kv_specs=INFO.kv_specs), ServerConfig(), sock)
    assert f"http://127.0.0.1:{port}/llm/v1/chat/completions" in chat
    assert "secret" not in chat and "Authorization: Bearer" in chat
    assert '"prompt": "' in text and "/v1/completions" in text
    assert '"prompt": [1, 2, 3]' in ids
    for block in (chat, text, ids):
        assert block.endswith("Application startup complete.\n")


def test_wrong_flags_end_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="--port"):
        run(["--port", "70000"])


def test_a_socket_that_is_served_is_not_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen(ServerConfig(uds=path)):
        with pytest.raises(ConfigError, match=f"cannot listen on {path}: Address already in use"):
            listen(ServerConfig(uds=path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    with pytest.raises(ConfigError, match="AF_UNIX path too long"):
        listen(ServerConfig(uds=str(tmp_path / ("s" * 120))))


class FakeApis:
    """API servers that are lost and found as a test says, and end when they are told to."""

    def __init__(self, *args: Any) -> None:
        self.lost_slot: tuple[int, str] | None = None
        self.told = [False]
        self.before_start = lambda: None

    def set_count(self, count: int) -> None:
        pass

    def ready(self) -> bool:
        return True

    def lost(self) -> tuple[int, str] | None:
        lost, self.lost_slot = self.lost_slot, None
        return lost

    def drop(self, slot: int) -> None:
        self.told[slot] = True

    def restart(self, slot: int) -> None:
        self.before_start()
        self.told[slot] = False

    def terminate(self) -> None:
        self.told = [True] * len(self.told)

    def alive(self, but: int | None = None) -> bool:
        return not all(told for slot, told in enumerate(self.told) if slot != but)


class FakeEngine:
    """An engine that is ready and lives."""

    number = 0

    def __init__(self, folder: Path) -> None:
        self.heartbeat = Heartbeat(str(folder / "heartbeat"))
        self.messages: list[EngineReady | EngineFailed] = [EngineReady(INFO)]
        self.deaths = 0

    def connect(self, index: int) -> Any:
        return SimpleNamespace(wait=lambda seconds: None, receive=self.receive)

    def receive(self) -> list[EngineReady | EngineFailed]:
        messages, self.messages = self.messages, []
        return messages

    def alive(self) -> bool:
        return True

    def announce_death(self) -> None:
        self.deaths += 1


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "ApiServers", FakeApis)
    monkeypatch.setattr(module, "launch_engine", lambda *args, **kwargs: FakeEngine(tmp_path))
    engine: Any = SimpleNamespace(model=None)
    sock: Any = None
    config = ServerConfig(engine_hang_timeout=5, shutdown_timeout=600, api_server_count=1)
    found = Supervisor(engine, config, sock, [])
    found._announced = True
    return found


def test_a_server_that_starts_while_the_signal_comes_is_told_too(supervisor: Any) -> None:
    supervisor.apis.lost_slot = 0, "gone"
    supervisor.apis.before_start = lambda: supervisor._signals.append(15)
    assert supervisor.run() == 0
    assert supervisor.apis.told == [True]


def test_an_api_server_that_cannot_start_is_tried_again_while_another_lives(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times in five minutes, whatever it says of the model; it is the end of the last one."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    apis, engine = supervisor.apis, supervisor.engine
    apis.told = [False, False]
    starts: list[float] = []
    apis.before_start = lambda: starts.append(clock.now)

    def lose(slot: int) -> str | None:
        engine.messages = [EngineFailed("no tokenizer.json", True)]
        apis.lost_slot = slot, "the API server process ended (exit code 2)"
        trouble = supervisor._trouble()
        assert (trouble.message, trouble.user_error) == ("no tokenizer.json", True)
        return supervisor._restart(trouble)  # type: ignore[no-any-return]

    def look(seconds: float) -> None:
        clock.now += seconds
        supervisor._restart_others()
        assert supervisor._trouble() is None

    for _ in range(4):
        assert lose(1) is None
        look(1.0)
    assert starts == [1000.0, 1001.0, 1002.0] and apis.told == [False, True]
    look(295.0)
    assert len(starts) == 3
    look(1.0)
    assert starts[3:] == [1300.0] and apis.told == [False, False]
    assert lose(0) is None  # the other one is starting
    look(0.5)
    assert lose(1) == ""
    supervisor._announced = False
    engine.messages = [EngineFailed("a wrong template", True)]
    assert supervisor._trouble().message == "a wrong template"


def test_an_engine_is_not_hung_where_we_were_stopped_with_it(
    supervisor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    beat = supervisor.engine.heartbeat
    beat.idle()
    assert supervisor._trouble() is None
    for _ in range(3):
        clock.now += 3600.0
        assert supervisor._trouble() is None
    beat.idle()
    for _ in range(25):
        clock.now += 0.2
        assert supervisor._trouble() is None
    clock.now += 0.4
    assert supervisor._trouble().hung
    beat.idle()
    supervisor._signals.append(15)
    clock.now += 3600.0
    assert supervisor.run() == 0
    assert not supervisor.engine.deaths


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of the tests are put back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_come_while_it_launches(
    handlers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are heeded once there is something to end, and the socket's path goes either way."""
    path = tmp_path / "s"

    def launch(engine: Any, server: Any, sock: Any, signals: list[int]) -> Any:
        assert path.is_socket()
        os.kill(os.getpid(), signal.SIGINT)
        if fails:
            raise OSError("no process")
        return SimpleNamespace(run=lambda: len(signals), close=list, on_sigusr1=signal.SIG_DFL)

    monkeypatch.setattr(module, "Supervisor", launch)
    fails = False
    assert run(["--uds", str(path)]) == 1 and not path.exists()
    fails = True
    with pytest.raises(OSError, match="no process"):
        run(["--uds", str(path)])
    assert not path.exists()
