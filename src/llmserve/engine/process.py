# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""EngineCoreProc: the loop around EngineCore, and the entry point of its process."""

import gc
import signal
import sys
import time
from collections.abc import Iterable
from types import FrameType

import msgspec
import zmq

from llmserve.config.hf import describe
from llmserve.core.messages import (
    AbortRequests,
    Clients,
    EngineFailed,
    EngineOutputs,
    EngineReady,
    EngineRequest,
    FromEngine,
    UtilityCall,
    UtilityResult,
)
from llmserve.engine.channel import (
    MAX_TO_ENGINE_BYTES,
    Codec,
    client_address,
    drain,
    engine_address,
    heartbeat_path,
    parts,
    pull_socket,
    push_socket,
)
from llmserve.engine.core import EngineCore
from llmserve.engine.launch import SUPERVISOR, EngineStart
from llmserve.engine.resolve import build
from llmserve.errors import ConfigError
from llmserve.utils.child import receive_start
from llmserve.utils.guard import guarded
from llmserve.utils.heartbeat import IDLE_BEAT_S, Heartbeat
from llmserve.utils.logger import configure, get_logger

logger = get_logger("llmserve.engine.process")  # as a main module, __name__ is another


_TELL_S = 0.05  # between words to API servers for which there is nothing else


class Shutdown(BaseException):
    """SIGTERM arrived."""


class EngineCoreProc:
    """Feeds messages to an EngineCore and its news to the clients."""

    def __init__(self, run_dir: str, clients: Iterable[int], engine: int = 0) -> None:
        self.heartbeat = Heartbeat(heartbeat_path(run_dir, engine))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._codec = Codec()
        self._inbox = pull_socket(
            self._context, engine_address(run_dir, engine), MAX_TO_ENGINE_BYTES
        )
        self._run_dir = run_dir
        self._clients = {index: self._connect(index) for index in clients}
        self._ready: EngineReady | None = None
        self._told = 0.0  # when all clients last heard how it stands
        self._owes = False  # since then it has changed
        self.num_bad_messages = 0

    def _connect(self, client: int) -> zmq.Socket[bytes]:
        return push_socket(self._context, client_address(self._run_dir, client), linger_ms=1000)

    def send(self, client: int, message: FromEngine) -> None:
        """To one client; nobody where it has gone."""
        if client in self._clients:
            self._clients[client].send(self._codec.encode(message), zmq.NOBLOCK)

    def broadcast(self, message: FromEngine) -> None:
        """To all clients."""
        for client in self._clients:
            self.send(client, message)

    def announce(self, ready: EngineReady) -> None:
        """To all clients, and to those that still come."""
        self._ready = ready
        self.broadcast(ready)

    def run(self, core: EngineCore) -> None:
        """Steps while there is work, sleeps on the socket while there is none."""
        core.heartbeat = self.heartbeat
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        if core.grammars is not None:
            poller.register(core.grammars.compiler.wake_fd, zmq.POLLIN)
        while True:
            if not core.has_work:
                self.heartbeat.idle()
                poller.poll(int(IDLE_BEAT_S * 1000))
            core.release_held()
            for data in drain(self._inbox):
                self._handle(core, data)
            if core.has_work:
                core.step()
            outputs = core.take_outputs()
            if outputs or self._owes:
                self._add_others(outputs, core.has_work)
                stats = core.stats()
                stats.num_dropped_frames = self.num_bad_messages
                for client, news in outputs.items():
                    for part in parts(news):
                        part.stats = stats
                        self.send(client, part)

    def _add_others(self, outputs: dict[int, EngineOutputs], busy: bool) -> None:
        """Clients without news learn how the engine stands too: now and then, and at the end."""
        if len(self._clients) <= 2:
            return
        now = time.monotonic()
        self._owes = busy and now - self._told <= _TELL_S
        if not self._owes:
            self._told = now
            for client in self._clients.keys() - {SUPERVISOR}:
                outputs.setdefault(client, EngineOutputs())

    def _handle(self, core: EngineCore, data: bytes) -> None:
        try:
            message = self._codec.decode_to_engine(data)
        except msgspec.DecodeError as error:
            self._drop(str(error))
            return
        if message.client not in self._clients:
            self._drop(f"there is no client {message.client}")
        elif isinstance(message, EngineRequest):
            core.add(message)
        elif isinstance(message, AbortRequests):
            core.abort(message)
        elif isinstance(message, Clients):
            self._change_clients(core, message)
        else:
            self._call(core, message)

    def _change_clients(self, core: EngineCore, message: Clients) -> None:
        if message.client != SUPERVISOR or SUPERVISOR not in message.clients:
            self._drop(f"client {message.client} is not the supervisor")
            return
        assert self._ready is not None
        for client in self._clients.keys() - message.clients:
            self._clients.pop(client).close(linger=0)
            core.abort_client(client)
        for client in message.clients:
            if client not in self._clients:
                self._clients[client] = self._connect(client)
                self.send(client, self._ready)

    def _drop(self, reason: str) -> None:
        self.num_bad_messages += 1
        if self.num_bad_messages.bit_count() == 1:  # 1, 2, 4, 8 ...: no flood of lines
            logger.error("dropped %d messages; the last: %s", self.num_bad_messages, reason[:200])

    def _call(self, core: EngineCore, message: UtilityCall) -> None:
        call_id = message.call_id
        result = guarded(
            lambda: UtilityResult(call_id, core.call(message.method, message.args)),
            lambda error: UtilityResult(call_id, error=f"{type(error).__name__}: {error}"),
        )
        self.send(message.client, result)

    def close(self) -> None:
        """Sends what is queued, for a second at most."""
        self._inbox.close()
        for client in self._clients.values():
            client.close()
        self._context.term()


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Shutdown


def main() -> int:
    """`python -m llmserve.engine.process FD`."""
    start = receive_start(int(sys.argv[1]), EngineStart)
    configure("EngineCore")
    signal.signal(signal.SIGTERM, _on_sigterm)
    proc = EngineCoreProc(start.run_dir, start.clients, start.engine)
    core: EngineCore | None = None
    began = time.monotonic()
    try:
        core, info = build(start.config, describe(start.config.model, start.config.load))
        logger.info("engine ready after %.1f s", time.monotonic() - began)
        gc.collect()
        gc.freeze()  # the model's objects live as long as we do: no collection walks them
        proc.announce(EngineReady(info, start.engine))
        proc.run(core)
    except Shutdown:
        return 0
    except ConfigError as error:
        proc.broadcast(EngineFailed(str(error), True, start.engine))
        return 2
    except Exception as error:  # boundary: the process ends, and says why
        logger.exception("the engine failed")
        proc.broadcast(EngineFailed(f"{type(error).__name__}: {error}", False, start.engine))
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if core is not None:
            core.shutdown()
        proc.close()
        gc.unfreeze()  # else Triton 3.9 prints at the end what it could not free
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
