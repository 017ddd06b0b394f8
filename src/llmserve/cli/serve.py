# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve serve`: the supervisor. It owns the engine and the API server, and outlives both."""

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from llmserve import envs
from llmserve.cli.args import parse_flags, take
from llmserve.cli.capacity import started_table
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, EngineReady, ModelInfo
from llmserve.engine.launch import ApiStart, launch_engine
from llmserve.errors import ConfigError
from llmserve.utils.child import Child
from llmserve.utils.logger import configure, get_logger

logger = get_logger(__name__)

DESCRIPTION = "Serve a model over the OpenAI API. Without MODEL, a small demo model."

_WATCH_INTERVAL_S = 0.2
_PROBE_TIMEOUT_S = 1.0
_GOODBYE_S = 5.0  # what the API server gets to end its streams once the engine is gone


def listen(config: ServerConfig) -> socket.socket:
    """The bound, listening socket of the API; ConfigError says why an address cannot be had."""
    if config.uds:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if Path(config.uds).is_socket():  # left by a server that was killed; never a file
            os.unlink(config.uds)
        address: str | tuple[str, int] = config.uds
    else:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (config.host, config.port)
    try:
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        where = config.uds or f"{config.host}:{config.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}") from None
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
        curl, url = f"curl --unix-socket {server.uds} ", "http://localhost"
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


class Supervisor:
    """Starts engine and API server together, and ends them together."""

    def __init__(self, engine: EngineConfig, server: ServerConfig, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._info: ModelInfo | None = None
        self._announced = False
        self._timeout = server.shutdown_timeout
        self.engine = launch_engine(engine, num_clients=2)
        self.client = self.engine.connect(1)  # hears what the engine says of itself
        start = ApiStart(server, engine.model, self.engine.run_dir, 0, 1, sock.fileno())
        self.api = Child("llmserve.api.server", start, (sock.fileno(),))
        self._signals = 0

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The first asks for a drain, the second ends everything now."""
        self._signals += 1
        if self._signals == 1:
            self.api.terminate()
        else:
            self._timeout = 0.0

    def run(self) -> int:
        """Watches until a signal or a death; the exit code."""
        cause = None
        while self.engine.alive() and self.api.alive() and not self._signals:
            self.client.wait(_WATCH_INTERVAL_S)
            cause = self._heard() or cause
            if self._info and not self._announced and is_ready(self._sock):
                self._announced = True
                sys.stdout.write(ready_block(self._info, self._server, self._sock))
                sys.stdout.flush()
        cause = self._heard() or cause
        if self._signals:
            return self._drain()
        if self.api.alive():  # so the engine is gone
            code = self.engine.child.process.poll()
            if cause is None:
                self.engine.announce_death()
                cause = EngineFailed(f"the engine process ended (exit code {code})", False)
            self.api.terminate()
            self.api.end(_GOODBYE_S)
        elif cause is None:
            code = self.api.process.poll()
            cause = EngineFailed(f"the API server process ended (exit code {code})", False)
        sys.stderr.write(f"llmserve: error: {cause.message}\n")
        return 2 if cause.user_error else 1

    def _drain(self) -> int:
        logger.info("shutting down; requests in flight get %g s", self._timeout)
        waited = 0.0
        while self.api.alive() and waited < self._timeout + _GOODBYE_S and self._signals < 2:
            self.client.wait(_WATCH_INTERVAL_S)
            self.client.receive()
            waited += _WATCH_INTERVAL_S
        return 0

    def _heard(self) -> EngineFailed | None:
        for message in self.client.receive():
            if isinstance(message, EngineFailed):
                return message
            if isinstance(message, EngineReady):
                self._info = message.model
        return None

    def close(self) -> None:
        """Ends what is left, and removes the sockets."""
        self.api.end(0.0)
        self.engine.shutdown()
        self.client.close()


def run(argv: list[str]) -> int:
    """Serves until told to stop. Exit codes: 0 stopped, 1 failed, 2 cannot be served as asked."""
    flags = parse_flags(
        argv, (*ENGINE_GROUPS, ServerConfig), prog="llmserve serve", description=DESCRIPTION
    )
    server = take(flags, ServerConfig)
    engine = EngineConfig.from_flags(**flags)
    configure("Supervisor")
    with listen(server) as sock:
        supervisor = Supervisor(engine, server, sock)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, supervisor.on_signal)
        try:
            return supervisor.run()
        finally:
            supervisor.close()
            if server.uds:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(server.uds)
