# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import numpy as np
import pytest

from llmserve.config.device import DeviceConfig
from llmserve.errors import ConfigError
from llmserve.worker import model_runner
from llmserve.worker.cuda_graph import decode_sizes, mixed_sizes
from tests.helpers.tiny_runner import CONFIGS, Driver, random_prompt

DEFAULT = DeviceConfig()


def test_decode_sizes_end_at_the_most_rows() -> None:
    assert decode_sizes(DEFAULT, 1) == [1]
    assert decode_sizes(DEFAULT, 6) == [1, 2, 4, 6]
    assert decode_sizes(DEFAULT, 64)[-3:] == [48, 56, 64]
    for limit in (1, 7, 100, 256, 1024):
        sizes = decode_sizes(DEFAULT, limit)
        assert sizes == sorted(set(sizes)) and sizes[-1] == min(limit, 512)
        assert all(b <= 2 * a or b <= 8 for a, b in zip(sizes, sizes[1:], strict=False))


def test_decode_sizes_of_flags() -> None:
    config = DeviceConfig(max_cudagraph_capture_size=12)
    assert decode_sizes(config, 100) == [1, 2, 4, 8, 12]
    config = DeviceConfig(cudagraph_capture_sizes=[8, 2, 64, 8])
    assert decode_sizes(config, 32) == [2, 8]
    with pytest.raises(ConfigError, match="--cudagraph-capture-sizes must be positive"):
        DeviceConfig(cudagraph_capture_sizes=[4, 0])


def test_mixed_sizes_end_at_the_most_tokens() -> None:
    assert mixed_sizes(DEFAULT, 10) == [10]
    assert mixed_sizes(DEFAULT, 100) == [16, 32, 64, 96, 100]
    assert mixed_sizes(DEFAULT, 16384)[-1] == 2048
    assert mixed_sizes(DeviceConfig(cudagraph_mode="FULL_DECODE_ONLY"), 100) == []

    sizes = mixed_sizes(DeviceConfig(cudagraph_mode="PIECEWISE"), 100)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 96, 100]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 11}])
def test_graph_equals_eager(
    architecture: str, params: dict[str, float], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token, with rows that come and go and prompts beside the decodes."""
    monkeypatch.setattr(model_runner, "MAX_WHOLE", 16)
    prompts = {slot: random_prompt(n, slot) for slot, n in {1: 5, 2: 33, 3: 70}.items()}
    runs = []
    for graphs in (False, True):
        driver = Driver(architecture, device="cuda")
        if graphs:
            driver.runner.capture(mode, [1, 2, 4], [16, 40], 5)
            replays = count_replays(driver.runner)
        out: dict[int, list[int]] = {}
        for slot, prompt in prompts.items():
            driver.add(slot, prompt, **params)
            others = dict.fromkeys(range(1, slot), 1)
            whole = {slot: len(prompt)} if slot < 3 else {slot: 38}
            last = [] if slot < 3 else [others | {slot: 32}]
            decodes = [dict.fromkeys(range(1, slot + 1), 1)] * 6
            for todo in (others | whole, *last, *decodes):
                for row, tokens in driver.step(todo).items():
                    out.setdefault(row, []).extend(tokens)
        runs.append(out)
    # 70 tokens beside two rows are two steps of 40 and 34
    decodes, mixed = {"FULL": (18, 4), "FULL_AND_PIECEWISE": (18, 1), "PIECEWISE": (0, 0)}[mode]
    wanted = {"_replay_decode": decodes, "_replay_mixed": mixed, "replay": 22 - decodes - mixed}
    assert replays == wanted
    assert runs[0] == runs[1]
    assert len(set(np.concatenate(list(runs[0].values())))) > 3


def count_replays(runner: Any) -> dict[str, int]:
    """Of whole decode steps, whole mixed ones and steps in pieces, from now on."""
    counts: dict[str, int] = {}
    for graphs, names in (
        (runner.graphs, ("_replay_decode", "_replay_mixed")), (runner.pieces, ("replay",)),
    ):  # fmt: skip
        for name in names:
            counts[name] = 0
            if graphs is None:
                continue
            original = getattr(graphs, name)

            def counted(*args: Any, name: str = name, original: Any = original) -> Any:
                counts[name] += 1
                return original(*args)

            setattr(graphs, name, counted)
    return counts
