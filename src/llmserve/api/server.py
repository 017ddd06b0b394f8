# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The API server process: uvicorn around the app, the engine's coming and going, the drain."""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from llmserve.api.admin import build_admin
from llmserve.api.app import build_app
from llmserve.api.listener import Listener
from llmserve.api.protocol import BoundedProtocol, ConnectionLimits
from llmserve.api.sse import RAW_SEND
from llmserve.api.state import AppState
from llmserve.config.server import ServerConfig
from llmserve.core.messages import EngineFailed, EngineLost, EngineReady, ModelInfo
from llmserve.engine.channel import announce
from llmserve.engine.client import EngineClient, model_in
from llmserve.engine.launch import SUPERVISOR, ApiStart
from llmserve.errors import ConfigError, LLMServeError, OverloadedError
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.input_processor import InputProcessor
from llmserve.metrics.board import BEAT_S, CONNECTIONS, Board
from llmserve.metrics.stats import ThroughputLog
from llmserve.utils.child import clear_socket, receive_start
from llmserve.utils.logger import configure, get_logger

logger = get_logger("llmserve.api.server")  # as a main module, __name__ is another

LOG_INTERVAL_S = 10.0
_KEEP_ALIVE_S = 75  # idle connections; longer than the usual proxy keeps its side
_LAST_BYTES_S = 2  # for error events to reach sockets that may be full
_POLL_S = 0.05
_SEND_BUFFER_BYTES = 64 << 10  # of a client's socket; the kernel doubles it
_SPARE_DESCRIPTORS = 96  # for all that is no connection of a client
_MOST_DESCRIPTORS = 65536
# How long the event loop waits for the interpreter while threads prepare schemas, for each of them.
# With Python's 5 ms, six such threads made five turns of the loop take 140 ms, instead of 20.
_SWITCH_S = 5e-4
_TRACE = 5  # uvicorn's level under DEBUG


class _Server(uvicorn.Server):
    """Signals are ours: they drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _SharedServer(_Server):
    """One of the servers that take connections from one socket."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board
        self._listeners: list[Listener] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on `sockets`, and says when something cannot be had."""
        await super().startup(sockets=[])
        make = partial(
            cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._listeners = [Listener(sock, make, self._accepts) for sock in sockets or ()]

    def _accepts(self, opening: int, left: bool) -> bool:
        return self._board.accepts(len(self.server_state.connections) + opening, left)

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: the other servers learn of connections that ended."""
        self._board.set(CONNECTIONS, len(self.server_state.connections))
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and lets those that there are end."""
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)


async def serve(
    server: ServerConfig,
    sock: socket.socket,
    connect: Callable[[], Awaitable[AsyncLLM]],
    served_names: Sequence[str] = (),
    board: Board | None = None,
) -> None:
    """Serves on the bound socket until SIGTERM; answers 503 until `connect` has returned.

    SIGTERM, or a failing `connect`, stops admission at once; requests in flight get
    `shutdown_timeout` seconds and then an error; a second SIGTERM cuts that short. Raises what
    `connect` raised.
    """
    state = AppState(server, served_names, board)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # those accepted too
    config = _uvicorn_config(state, _with_raw_send(build_app(state)), _connections())
    http = _SharedServer(config, state.board)
    stop = asyncio.Event()
    hurry = asyncio.Event()

    def on_sigterm() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, on_sigterm)
    serving = asyncio.ensure_future(http.serve(sockets=[sock]))
    starting = asyncio.ensure_future(_start(state, connect))
    stopping = asyncio.ensure_future(stop.wait())
    beating = asyncio.ensure_future(_beat(state))
    own_admin = server.admin_socket if state.board.slot == 0 else None
    admin = asyncio.ensure_future(_serve_admin(state, own_admin)) if own_admin else None
    try:
        ends = {serving, stopping, *([admin] if admin else [])}
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is None:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await _drain(state, hurry)
        http.should_exit = True
        await serving
        if starting.done():
            starting.result()
        if admin is not None and admin.done():
            admin.result()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        for task in (serving, starting, stopping, beating, *([admin] if admin else [])):
            task.cancel()
        if state.llm is not None:
            state.llm.shutdown()


def _with_raw_send(app: ASGIApp) -> ASGIApp:
    """Lets streams write past all that is around the routes, FastAPI's own layers too."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        scope[RAW_SEND] = send
        await app(scope, receive, send)

    return outermost


async def _beat(state: AppState) -> None:
    while True:
        state.beat()
        await asyncio.sleep(BEAT_S)


async def _start(state: AppState, connect: Callable[[], Awaitable[AsyncLLM]]) -> None:
    llm = await connect()
    gc.collect()
    gc.freeze()  # with all that is loaded, a full collection beside large bodies took 40 to 120 ms
    state.attach(llm)
    if state.board.slot == 0 and not state.server.disable_log_stats:
        state.background = asyncio.ensure_future(_log_throughput(state, llm))


async def _log_throughput(state: AppState, llm: AsyncLLM) -> None:
    log = ThroughputLog(lambda: state.total_stats(llm), time.monotonic())
    while True:
        await asyncio.sleep(LOG_INTERVAL_S)
        line = log.line(llm.stats, time.monotonic())
        if line is not None:
            logger.info(line)


async def _drain(state: AppState, hurry: asyncio.Event) -> None:
    state.drain()
    if state.background is not None:
        state.background.cancel()
    hurrying = asyncio.ensure_future(hurry.wait())
    deadline = time.monotonic() + state.server.shutdown_timeout
    while state.num_running and not hurry.is_set():
        idle = asyncio.ensure_future(state.idle.wait())
        left = deadline - time.monotonic()
        if left <= 0:
            break
        await asyncio.wait({idle, hurrying}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
    hurrying.cancel()
    if state.num_running:
        logger.warning("ending %d requests that still run", state.num_running)
        state.cut(OverloadedError("The server is shutting down.", code="draining"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(state.idle.wait(), _LAST_BYTES_S)


async def _serve_admin(state: AppState, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        before = os.umask(0o177)
        try:
            clear_socket(path)
            sock.bind(path)
        except OSError as error:
            raise ConfigError(f"cannot listen on {path}: {error.strerror}") from None
        finally:
            os.umask(before)
        try:
            config = _uvicorn_config(state, build_admin(state), _SPARE_DESCRIPTORS // 4)
            await _Server(config).serve(sockets=[sock])
        finally:
            Path(path).unlink(missing_ok=True)


def _connections() -> int:
    """How many clients there are descriptors for, once as many are asked for as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(_SPARE_DESCRIPTORS, most - _SPARE_DESCRIPTORS)


def _uvicorn_config(state: AppState, app: Any, max_connections: int) -> uvicorn.Config:
    server = state.server
    level = server.uvicorn_log_level.upper()
    own = logging.getLogger("llmserve")
    for name in ("uvicorn", "uvicorn.access"):
        log = logging.getLogger(name)
        log.handlers[:] = own.handlers
        log.setLevel(_TRACE if level == "TRACE" else level)
        log.propagate = False
    access = logging.getLogger("uvicorn.access")
    access.filters[:] = [_is_no_probe]
    if server.disable_uvicorn_access_log:
        access.handlers.clear()
    limits = ConnectionLimits(
        server.read_timeout, server.write_timeout, max_connections, state.metrics.edge.refuse
    )
    return uvicorn.Config(
        app,
        http=cast(type[BoundedProtocol], partial(BoundedProtocol, limits)),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=not server.disable_uvicorn_access_log,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_BYTES_S,
        backlog=2048,
    )


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Probes come every few seconds for ever and say nothing."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    return len(arguments) < 3 or not str(arguments[2]).startswith("/health")


async def wait_ready(client: EngineClient) -> ModelInfo:
    """Waits for the engine's word; ConfigError or EngineError if it gives up."""
    while True:
        messages = client.receive()
        for message in messages:
            if isinstance(message, EngineLost | EngineReady) and message.engine > client.engine:
                client.reconnect(message.engine)
        if (model := model_in(messages)) is not None:
            return model
        await asyncio.sleep(_POLL_S)


async def connect_engine(start: ApiStart, client: EngineClient) -> AsyncLLM:
    """The engine's front, once the engine is ready."""
    model = await wait_ready(client)
    processor = await asyncio.to_thread(
        InputProcessor.for_model,
        model,
        start.model,
        chat_template=start.server.chat_template,
        default_template_kwargs=start.server.default_chat_template_kwargs,
    )
    llm = AsyncLLM(client, model, tokenizer=processor.tokenizer, input_processor=processor)
    llm.start()
    return llm


def sweep(start: ApiStart) -> None:
    """Removes what a supervisor that was killed could not."""
    own_admin = start.server.admin_socket if start.slot == 0 else None
    for path in filter(None, (start.server.uds, own_admin)):
        if Path(path).is_socket():
            Path(path).unlink(missing_ok=True)
    shutil.rmtree(start.run_dir, ignore_errors=True)


def main() -> int:
    """`python -m llmserve.api.server FD`. Exit codes: 0 told to stop, 1 failed, 2 user error."""
    start = receive_start(int(sys.argv[1]), ApiStart, sweep)
    sys.setswitchinterval(_SWITCH_S)
    configure(f"APIServer{start.slot or ''}")
    board = Board(start.board, start.slot, len(start.server.api_key))
    client = EngineClient(start.run_dir, start.client, start.engine)
    try:
        with socket.socket(fileno=start.socket_fd) as sock:
            uvloop.run(
                serve(
                    start.server,
                    sock,
                    lambda: connect_engine(start, client),
                    start.model.served_model_name,
                    board,
                )
            )
    except LLMServeError as error:
        user_error = isinstance(error, ConfigError)
        announce(start.run_dir, SUPERVISOR, EngineFailed(error.message, user_error))
        return 2 if user_error else 1
    finally:
        client.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
