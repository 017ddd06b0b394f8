# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""An engine in this process, driven by hand."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import describe
from llmserve.core.messages import AbortRequests, EngineRequest, RequestExtra
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.core import EngineCore
from llmserve.engine.resolve import build


class Result:
    """What the engine said of one request."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.extras: list[RequestExtra] = []

    @property
    def finish_reason(self) -> str | None:
        return next((e.finish_reason for e in self.extras if e.finish_reason), None)

    @property
    def num_cached_tokens(self) -> int | None:
        return next(
            (e.num_cached_tokens for e in self.extras if e.num_cached_tokens is not None), None
        )


class Engine:
    """Wraps an EngineCore; `run` steps until all is finished and checks that nothing is left."""

    def __init__(self, model: Path, **flags: Any) -> None:
        flags = {"device": "cpu", "dtype": "float32", "cpu_threads": 1} | flags
        config = EngineConfig.from_flags(model=str(model), **flags)
        self.core: EngineCore
        self.core, self.info = build(config, describe(config.model, config.load))
        self.results: dict[int, Result] = {}
        self._next_id = 0

    def add(
        self,
        prompt: Iterable[int],
        *,
        client: int = 0,
        priority: int = 0,
        cache_salt: str = "",
        **params: Any,
    ) -> int:
        """Queues a greedy request (unless `params` says otherwise); its id."""
        params = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | params
        request_id = self._next_id
        self._next_id += 1
        self.results[request_id] = Result()
        self.core.add(
            EngineRequest(
                client=client,
                request_id=request_id,
                prompt=np.asarray(list(prompt), np.int32).tobytes(),
                params=SamplingParams(**params),
                arrival=time.monotonic(),
                priority=priority,
                cache_salt=cache_salt,
            )
        )
        return request_id

    def abort(self, request_id: int, client: int = 0) -> None:
        """As a client would."""
        self.core.abort(AbortRequests(client, [request_id]))

    def step(self) -> None:
        """One engine step, its news filed."""
        self.core.release_held()
        if self.core.has_work:
            self.core.step()
        elif self.core.scheduler.held:
            time.sleep(0.005)
        for news in self.core.take_outputs().values():
            ids = np.frombuffer(news.ids, np.uint32).tolist()
            for request_id, token in zip(
                ids, np.frombuffer(news.tokens, np.int32).tolist(), strict=True
            ):
                self.results[request_id].token_ids.append(token)
            for request_id, extra in news.extras.items():
                self.results[request_id].extras.append(extra)

    def run(self) -> dict[int, Result]:
        """Until nothing is left to do; then no block and no request may be lost."""
        for _ in range(100_000):
            self.step()
            if not self.core.has_work and not self.core.scheduler.held:
                break
        self.check_idle()
        return self.results

    def check_idle(self) -> None:
        """No request left, every block free or cached."""
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_blocks_free + stats.num_blocks_cached == stats.num_blocks_total
        self.core.scheduler.check_integrity()

    def generate(self, prompts: list[list[int]], **params: Any) -> list[list[int]]:
        """Adds all, runs, returns their tokens in order."""
        ids = [self.add(prompt, **params) for prompt in prompts]
        self.run()
        return [self.results[i].token_ids for i in ids]

    def close(self) -> None:
        """Ends the executor, and the grammar compiler."""
        self.core.shutdown()


@contextlib.contextmanager
def engines_of(model: Path) -> Iterator[Callable[..., Engine]]:
    """Small engines by their flags; each is made once, for its compiler has to start."""
    made: dict[str, Engine] = {}

    def get(**flags: Any) -> Engine:
        name = repr(sorted(flags.items()))
        if name not in made:
            sizes = {"max_model_len": 256, "num_gpu_blocks_override": 200, "max_num_seqs": 16}
            made[name] = Engine(model, **(sizes | flags))
        return made[name]

    yield get
    for one in made.values():
        one.close()
