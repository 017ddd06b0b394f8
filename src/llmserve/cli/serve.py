# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve serve`: the supervisor. It owns the engine and the API servers, and outlives them."""

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import FrameType

from llmserve import envs
from llmserve.cli.api_servers import ApiServers, default_count
from llmserve.cli.args import parse_flags, take
from llmserve.cli.capacity import started_table
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, EngineLost, EngineReady, ModelInfo
from llmserve.engine.launch import SUPERVISOR, launch_engine
from llmserve.errors import ConfigError
from llmserve.utils.child import WHEN_STUCK, clear_socket, dump_stacks, write_stacks
from llmserve.utils.heartbeat import Watchdog
from llmserve.utils.logger import configure, get_logger

logger = get_logger(__name__)

DESCRIPTION = (
    "Serve a model over the OpenAI API. Without MODEL, a small demo model. SIGTERM and SIGINT let "
    "running requests finish, a second one ends them; SIGUSR1 writes all stacks to the log. Exit "
    "codes: 0 stopped, 1 failed (the cause is the last line), 2 cannot be served as asked."
)

_WATCH_INTERVAL_S = 0.2
_PROBE_TIMEOUT_S = 1.0
_GOODBYE_S = 5.0  # what API servers get to end their streams once the engine is gone
_MAX_RESTARTS = 3
_RESTARTS_IN_S = 300.0


def listen(config: ServerConfig) -> socket.socket:
    """The bound, listening socket of the API; ConfigError says why an address cannot be had."""
    if config.uds:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: str | tuple[str, int] = config.uds
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (config.host, config.port)
    try:
        if config.uds:
            clear_socket(config.uds)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        sock.close()
        where = config.uds or f"{config.host}:{config.port}"
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {where}: {reason}") from None
    return sock


def is_ready(sock: socket.socket) -> bool:
    """Whether the API behind our listening socket answers GET /health/ready with 200."""
    address = sock.getsockname()
    if sock.family != socket.AF_UNIX:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        address = (host, address[1])
    request = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.socket(sock.family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(address)
            probe.sendall(request)
            return probe.recv(16).startswith(b"HTTP/1.1 200")
        except OSError:
            return False


def ready_block(info: ModelInfo, server: ServerConfig, sock: socket.socket) -> str:
    """Address, what fits, and a request to paste."""
    if server.uds:
        curl, url = f"curl --unix-socket {shlex.quote(server.uds)} ", "http://localhost"
    else:
        host, port = sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        curl, url = "curl ", f"http://{host}:{port}"
    url += server.root_path
    name = info.name
    key = "-H 'Authorization: Bearer YOUR_KEY' " if server.api_key or envs.API_KEY else ""
    body = '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}'
    path = "/v1/chat/completions"
    if info.chat_template is None:
        body, path = '{"prompt": "The sea is", "max_tokens": 32}', "/v1/completions"
    if not info.tokenizer:
        body = '{"prompt": [1, 2, 3], "max_tokens": 32}'
    return (
        f"\n{started_table(info)}\n\n"
        f"{name} is ready on {url}/v1\n\n"
        f"  {curl}{url}{path} -H 'Content-Type: application/json' {key}-d '{body}'\n\n"
        "Application startup complete.\n"
    )


def say(text: str) -> None:
    """Prints `text`. Where that cannot be, as on a full disk, the log says so and requests are
    served all the same."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        logger.warning("stdout cannot be written: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left must not fail once more


@dataclass
class Trouble:
    """Why the processes cannot go on as they are; `slot` is that of an API server, None is the
    engine."""

    message: str
    user_error: bool = False
    hung: bool = False
    slot: int | None = None


class Restarts:
    """How often something was started anew: _MAX_RESTARTS times in _RESTARTS_IN_S at most."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MAX_RESTARTS)

    def spend(self, now: float) -> bool:
        """Whether it may be done once more."""
        if len(self._times) == _MAX_RESTARTS and now - self._times[0] < _RESTARTS_IN_S:
            return False
        self._times.append(now)
        return True


class Supervisor:
    """Starts engine and API servers, replaces each that fails, and ends them together.

    Those that are left are told: the API servers of a lost engine, the engine of a lost API server.
    """

    def __init__(
        self, engine: EngineConfig, server: ServerConfig, sock: socket.socket, signals: list[int]
    ) -> None:
        self._server = server
        self._sock = sock
        self._info: ModelInfo | None = None  # of the engine as it is now
        self._announced = False
        self._signals = signals  # the first asks for a drain, the second ends everything now
        self._wants_stacks = False
        self._watchdog = Watchdog()
        self._said: EngineFailed | None = None  # by an API server that gave up
        self._empty: list[int] = []  # slots of API servers that may not be restarted yet
        self._engine_restarts, self._api_restarts = Restarts(), Restarts()
        count = server.api_server_count or 1
        self.engine = launch_engine(engine, num_clients=1 + count)
        self._began = time.monotonic()
        try:
            self.client = self.engine.connect(SUPERVISOR)  # hears what the engine says of itself
            self.apis = ApiServers(server, engine.model, sock, self.engine, self.client)
            self.apis.set_count(count)
        except BaseException:  # boundary: what was started must not outlive the failure
            self.engine.shutdown(0.0)
            raise

    def on_sigusr1(self, signum: int, frame: FrameType | None) -> None:
        """Asks for the stacks of all processes."""
        self._wants_stacks = True
        write_stacks(signum, frame)

    def run(self) -> int:
        """Watches until a signal, or until restarting does not help; the exit code."""
        while not self._signals:
            self.client.wait(_WATCH_INTERVAL_S)
            if self._wants_stacks:
                self._wants_stacks = False
                dump_stacks(os.getpid())
            self._restart_others()
            trouble = self._trouble()
            if trouble is not None:
                if self._signals:
                    break
                if (times := self._restart(trouble)) is not None:
                    return self._give_up(trouble, times)
            elif self._info and not self._announced and self._all_ready():
                self._announced = True
                say(ready_block(self._info, self._server, self._sock))
        return self._drain()

    def _all_ready(self) -> bool:
        return self.apis.ready() and is_ready(self._sock)

    def _trouble(self) -> Trouble | None:
        engine_is_dead, lost = not self.engine.alive(), self.apis.lost()
        for message in self.client.receive():  # what they said is there by now
            if isinstance(message, EngineFailed) and message.engine == self.engine.number:
                return Trouble(message.message, message.user_error)
            if isinstance(message, EngineFailed) and message.engine < 0:
                if message.user_error and not self._announced:
                    return Trouble(message.message, user_error=True)
                self._said = message
            if isinstance(message, EngineReady) and message.engine == self.engine.number:
                self._info = message.model
                if self._server.api_server_count is None and not self._announced:
                    cores = len(os.sched_getaffinity(0))
                    self.apis.set_count(default_count(message.model, cores))
        if engine_is_dead:
            code = self.engine.child.process.poll()
            return Trouble(f"the engine process ended (exit code {code})")
        if lost is not None:
            said, self._said = self._said or EngineFailed(lost[1], False), None
            return Trouble(said.message, said.user_error, slot=lost[0])
        if self._info is None:
            limit = self._server.engine_start_timeout
            if time.monotonic() - self._began > limit:
                return Trouble(f"the engine was not ready after {limit:g} s")
        elif self._hangs():
            age = self.engine.heartbeat.age
            return Trouble(f"the engine has made no step for {age:.1f} s", hung=True)
        return None

    def _hangs(self) -> bool:
        heartbeat = self.engine.heartbeat
        allowed = heartbeat.allowed(self._server.engine_hang_timeout)
        return self._watchdog.quiet(heartbeat.sign) > allowed

    def _restart(self, trouble: Trouble) -> str | None:
        """Starts anew what was lost; or why not, to be added to the cause. The place of an API
        server that may not be restarted stays empty until it may, where others go on."""
        now = time.monotonic()
        others = trouble.slot is not None and self.apis.alive(but=trouble.slot)
        if not self._announced or (trouble.user_error and not others):
            return ""
        restarts = self._engine_restarts if trouble.slot is None else self._api_restarts
        times = f"; it was restarted {_MAX_RESTARTS} times in {_RESTARTS_IN_S / 60:g} minutes"
        may = restarts.spend(now)
        if not may and not others:
            return times
        later = f"{times}; the other API servers go on, and it is tried again later"
        logger.error("%s%s", trouble.message, "; restarting" if may else later)
        if trouble.slot is not None:
            self.apis.drop(trouble.slot)
            if may:
                self.apis.restart(trouble.slot)
            else:
                self._empty.append(trouble.slot)
            return None
        if trouble.hung:
            dump_stacks(os.getpid())
            dump_stacks(self.engine.child.process.pid, WHEN_STUCK)
        self._info, self._began = None, now
        self.client.reconnect(self.engine.number + 1)
        self.engine.restart()
        self.engine.announce(EngineLost(trouble.message, self.engine.number, trouble.hung))
        return None

    def _restart_others(self) -> None:
        """Fills places of API servers that stayed empty, once that may be."""
        while self._empty and self._api_restarts.spend(time.monotonic()):
            logger.info("starting an API server once more")
            self.apis.restart(self._empty.pop(0))

    def _give_up(self, trouble: Trouble, times: str) -> int:
        self.engine.child.end(0.0)
        self.engine.announce_death()
        self.apis.terminate()
        self.apis.end(_GOODBYE_S)
        sys.stderr.write(f"llmserve: error: {trouble.message}{times}\n")
        return 2 if trouble.user_error else 1

    def _drain(self) -> int:
        timeout = self._server.shutdown_timeout
        logger.info("shutting down; requests in flight get %g s", timeout)
        self.apis.terminate()  # one that was just started too
        end = time.monotonic() + timeout + _GOODBYE_S
        told = False
        while self.apis.alive() and time.monotonic() < end and len(self._signals) < 2:
            self.client.wait(_WATCH_INTERVAL_S)
            self.client.receive()
            if not told and (self._hangs() or not self.engine.alive()):
                told = True
                self.engine.announce_death()
        return 0

    def close(self) -> None:
        """Ends what is left, and removes the sockets."""
        self.apis.end(0.0)
        self.engine.shutdown(0.0 if len(self._signals) > 1 else _GOODBYE_S)
        self.client.close()


def run(argv: list[str]) -> int:
    """Serves until told to stop; the exit code is as DESCRIPTION says."""
    flags = parse_flags(
        argv, (*ENGINE_GROUPS, ServerConfig), prog="llmserve serve", description=DESCRIPTION
    )
    server = take(flags, ServerConfig)
    engine = EngineConfig.from_flags(**flags)
    envs.set_log_format(server.log_format)
    configure("Supervisor")
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: signals.append(signum))
    with listen(server) as sock:
        try:
            supervisor = Supervisor(engine, server, sock, signals)
            signal.signal(signal.SIGUSR1, supervisor.on_sigusr1)
            try:
                return supervisor.run()
            finally:
                supervisor.close()
        finally:
            if server.uds:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(server.uds)
