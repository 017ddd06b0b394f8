# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Steps in pieces without CUDA: a thread that stops where a graph would end stands for them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmserve.worker import piecewise
from llmserve.worker.piecewise import PieceGraphs
from tests.helpers.tiny_runner import CONFIGS, Driver, random_prompt

torch.set_num_threads(1)


class _Pieces:
    """Runs `run` again, up to the next break with each replay; the result goes where the first
    one lies."""

    def __init__(self, run: Callable[[], torch.Tensor], breaks: list[Callable[[], None]]) -> None:
        self.count = 1
        breaks.append(self._count)
        self.result = run()
        breaks.clear()
        self._run, self._breaks = run, breaks
        self._stopped, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def _count(self) -> None:
        self.count += 1

    def _stop(self) -> None:
        self._stopped.release()
        self._go.acquire()

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            self.result.copy_(self._run())
        finally:
            self._breaks.clear()
            self._stopped.release()

    def replay(self) -> None:
        """The next piece."""
        if self._breaks:
            self._go.release()
        else:
            self._breaks.append(self._stop)
            threading.Thread(target=self._work, daemon=True).start()
        assert self._stopped.acquire(timeout=120)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_pieces_equal_eager(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token: prompts in chunks beside decodes, steps of fewer tokens than the ones
    before, a step larger than any graph. Padding changes no block but the sink."""

    def record(run: Any, pool: Any, breaks: Any) -> tuple[list[_Pieces], torch.Tensor]:
        pieces = _Pieces(run, breaks)
        return [pieces] * pieces.count, pieces.result

    monkeypatch.setattr(piecewise, "record", record)
    prompts = {slot: random_prompt(n, slot) for slot, n in {1: 5, 2: 33, 3: 70}.items()}
    steps = [{1: 5, 2: 30}, {1: 1, 2: 3, 3: 20}, {1: 1, 2: 1}, {1: 1, 2: 1, 3: 50}, {3: 1, 1: 1}]
    runs, caches, replayed = [], [], []
    for in_pieces in (False, True):
        driver = Driver(architecture)
        runner = driver.runner
        if in_pieces:
            with torch.inference_mode():
                pieces = PieceGraphs(
                    runner.batcher, runner._layers, [4, 24, 40], (0, 0), runner.model.forward
                )
            replay = pieces.replay

            def counted(inputs: Any, replay: Any = replay) -> torch.Tensor | None:
                hidden: torch.Tensor | None = replay(inputs)
                replayed.append(None if hidden is None else len(hidden))
                return hidden

            monkeypatch.setattr(pieces, "replay", counted)
            runner.pieces = pieces
        for slot, prompt in prompts.items():
            driver.add(slot, prompt)
        runs.append([driver.step(todo) for todo in steps])
        caches.append(torch.stack([cache[1:] for cache, _, _ in runner._layers]))
    assert replayed == [40, 24, 4, None, 4]
    assert runs[0] == runs[1]
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-4, atol=1e-4)
