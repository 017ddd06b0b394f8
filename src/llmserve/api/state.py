# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What all routes of one server share: the engine's front, its phase, and what is in flight."""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from starlette.types import Receive

from llmserve.api.errors import ClientGone, HttpError, missing
from llmserve.config.server import ServerConfig
from llmserve.errors import (
    DeadlineError,
    EngineDeadError,
    LLMServeError,
    NotFoundError,
    OverloadedError,
    RequestError,
)
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.caller import CALLER
from llmserve.frontend.chat_template import ChatTemplate
from llmserve.frontend.parsed_text import shown_tokens
from llmserve.metrics.board import ENDED, PLACES, READY, REQUESTS, RUNNING, UNFINISHED, Board
from llmserve.metrics.edge import DrainRate
from llmserve.metrics.prometheus import EngineHealth, MetricsPage
from llmserve.metrics.stats import RequestStats
from llmserve.parsers.registry import Parsers, choose_parsers
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

T = TypeVar("T")
Phase = Literal["starting", "ready", "draining"]

_RESTART_S = 5  # what a client is told to wait while the engine restarts
_DEADLINE_GRACE_S = 1.0  # the engine, which knows whether a request still waits, answers first

_REFUSALS: dict[Phase, str] = {
    "starting": "The model is still being loaded.",
    "draining": "The server is shutting down.",
}


class AppState:
    """One API server. `llm` is None until the engine has said that it is ready. What is counted of
    requests, and what bounds them, is on the `board`, for all servers together."""

    def __init__(
        self, server: ServerConfig, served_names: Sequence[str] = (), board: Board | None = None
    ) -> None:
        self.server = server
        self.board = board or Board(num_keys=len(server.api_key))
        self.names = list(served_names)
        self.created = int(time.time())
        self.phase: Phase = "starting"
        self.parsers = Parsers(None, None)
        self.shown_tokens: dict[int, str] = {}
        self.llm: AsyncLLM | None = None
        self.stats: RequestStats | None = None
        self.metrics = MetricsPage(self.board)
        self.background: asyncio.Task[None] | None = None
        self.idle = asyncio.Event()
        self.idle.set()
        self.num_keys = 0
        self._running: dict[asyncio.Task[Any], LLMServeError | None] = {}
        self._drain_rate = DrainRate(lambda: self.board.total(ENDED))

    def attach(self, llm: AsyncLLM) -> None:
        """The engine is ready; requests are taken from now on."""
        self.llm = llm
        self._choose_parsers(llm)
        self.names = self.names or [llm.model.name]
        cells, is_first = self.board.counters(REQUESTS), self.board.slot == 0
        self.stats = llm.observer = RequestStats(
            llm.model.max_model_len, lambda: llm.stats, cells, follows_steps=is_first
        )
        self.metrics.edge.dropped_frames = lambda: llm.num_dropped_frames
        self.metrics.add_engine(
            self.names[0],
            llm.model,
            lambda: llm.stats,
            lambda: self.total_stats(llm),
            lambda: EngineHealth(llm.num_restarts, llm.heartbeat_age),
        )
        if self.phase == "starting":
            self.phase = "ready"
            self.board.set(READY, 1)

    def total_stats(self, llm: AsyncLLM) -> RequestStats:
        """What all servers observed, as it stands."""
        totals = self.board.totals(REQUESTS)
        return RequestStats(llm.model.max_model_len, lambda: llm.stats, totals)

    def drain(self) -> None:
        """Takes no more requests."""
        self.phase = "draining"
        self.board.set(READY, 0)

    def beat(self) -> None:
        """Shows the supervisor that we get on, and the servers beside us what we have."""
        self.board.beat()
        self.metrics.edge.publish()
        self._drain_rate.roll()
        if self.llm is not None and self.stats is not None:
            self.board.set(UNFINISHED, self.llm.num_unfinished)
            self.stats.on_step()

    def _choose_parsers(self, llm: AsyncLLM) -> None:
        template = llm.input_processor.template
        self.parsers = choose_parsers(
            template.source if template else "",
            llm.model.architecture,
            self.server.tool_call_parser,
            self.server.reasoning_parser,
        )
        if llm.tokenizer is not None:
            self.shown_tokens = shown_tokens(llm.tokenizer, self.parsers.markers)
        for kind, parser in (
            ("tool calls", self.parsers.tool),
            ("reasoning", self.parsers.reasoning),
        ):
            if parser is not None:
                logger.info("%s are read by %s", kind, parser.__name__)

    @property
    def engine_is_dead(self) -> bool:
        """Whether no request will be served any more."""
        return self.llm is not None and self.llm.dead is not None

    def engine(self) -> AsyncLLM:
        """The engine's front; OverloadedError or EngineDeadError while it takes no requests."""
        llm = self.llm
        if self.phase != "ready" or llm is None:
            raise OverloadedError(_REFUSALS[self.phase], code=self.phase)
        if self.engine_is_dead:
            raise EngineDeadError("The engine ended.", code="engine_dead")
        if llm.lost is not None:
            message = "The engine is being restarted."
            raise OverloadedError(message, code=llm.lost.code, retry_after=_RESTART_S)
        if llm.is_late(self.server.engine_hang_timeout):
            message = "The engine does not get on."
            raise OverloadedError(message, code="engine_hung", retry_after=_RESTART_S)
        return llm

    def template_of(self, source: str | None) -> ChatTemplate | None:
        """A request's own chat template, which this server has to trust; None is the model's."""
        if source is None:
            return None
        if not self.server.trust_request_chat_template:
            raise RequestError(
                "Unsupported parameter: 'chat_template' needs a server that runs with "
                "--trust-request-chat-template.",
                param="chat_template",
                code="unsupported_parameter",
            )
        return self.engine().input_processor.foreign_template(source)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer with; NotFoundError lists what there is."""
        if name is None:
            if not self.names:
                raise missing("model")
            return self.names[0]
        if name not in self.names:
            raise NotFoundError(
                f"The model `{name[:200]}` does not exist. This server has: "
                f"{', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        return name

    def check_place(self, key: int) -> None:
        """Whether there is a place for one more request of the key.

        HttpError 429 where the key has as many as it may, OverloadedError where the engine has.
        """
        self._check_place(key, 1)

    def _check_place(self, key: int, more: int) -> None:
        model = self.llm.model if self.llm is not None else None
        most = 0
        if model is not None and model.max_num_queued_reqs:
            most = model.max_num_seqs + model.max_num_queued_reqs
        most_of_key = self.server.max_requests_per_key
        if most_of_key is None:
            most_of_key = most // 2 if self.num_keys > 1 else 0
        if most_of_key and self.board.places(key) + more > most_of_key:
            self.metrics.edge.refuse("key_limit")
            raise _too_many(most_of_key, self._drain_rate.seconds(1))
        if self.llm is not None and model is not None:
            stats, board = self.llm.stats, self.board
            board.set(UNFINISHED, self.llm.num_unfinished)
            if most and max(board.sum(PLACES) + more, board.sum(UNFINISHED) + 1) > most:
                self._overloaded("queue_full", "requests", stats.num_waiting)
            tokens = model.max_num_queued_tokens
            if tokens and stats.num_waiting_tokens >= tokens:
                self._overloaded("queue_tokens", "prompt tokens", stats.num_waiting)

    def take_place(self, key: int) -> None:
        """The place that `check_place` looks for, to be left once the request is answered.

        Taken before it is looked for: of two servers that want the last one, both may be refused,
        but never both be given it.
        """
        self.board.move(key, 1)
        try:
            self._check_place(key, 0)
        except LLMServeError:
            self.board.move(key, -1)
            raise

    def leave_place(self, key: int) -> None:
        """The request of a `take_place` is answered."""
        self.board.move(key, -1)
        self.board.count(ENDED)

    def _overloaded(self, reason: str, what: str, num_waiting: int) -> None:
        self.metrics.edge.refuse(reason)
        seconds = self._drain_rate.seconds(max(num_waiting, 1) // 2)
        raise OverloadedError(f"Too many {what} are waiting.", retry_after=seconds)

    @property
    def num_running(self) -> int:
        """Requests between admission and their last byte."""
        return len(self._running)

    def cut(self, error: LLMServeError) -> None:
        """Ends all requests in flight; each client is told `error`."""
        for task in self._running:
            self._running[task] = error
            task.cancel()

    def _expire(self, task: asyncio.Task[Any]) -> None:
        self._running[task] = DeadlineError("The request took longer than its time.")
        task.cancel()

    async def watched(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` while the client is there.

        Raises ClientGone when it leaves, and what `cut` was given when we end it; `work` is
        cancelled in both cases.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect(receive))
        gone.add_done_callback(lambda _: task.cancel())
        self._running[task] = None
        self.board.set(RUNNING, len(self._running))
        self.idle.clear()
        timer = None
        if deadline := CALLER.get().deadline:
            left = deadline - time.monotonic() + _DEADLINE_GRACE_S
            timer = asyncio.get_running_loop().call_later(left, self._expire, task)
        try:
            return await task
        except asyncio.CancelledError:
            if (error := self._running[task]) is not None:
                raise error from None
            if gone.done() and not gone.cancelled():
                raise ClientGone from None
            raise
        finally:
            gone.cancel()
            if timer is not None:
                timer.cancel()
            del self._running[task]
            self.board.set(RUNNING, len(self._running))
            if not self._running:
                self.idle.set()


def _too_many(most: int, retry_after: int) -> HttpError:
    error = HttpError(
        429,
        f"This API key has {most} requests in flight already.",
        code="rate_limit_exceeded",
        headers={"retry-after": str(retry_after), "retry-after-ms": str(retry_after * 1000)},
    )
    error.type = "rate_limit_error"
    return error


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def state_of(request: Request) -> AppState:
    """The state that `build_app` left in the application."""
    state = request.app.state.llmserve
    assert isinstance(state, AppState)
    return state
