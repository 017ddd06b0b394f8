# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np
import pytest

from llmserve.worker.cuda_graph import capture_sizes
from tests.helpers.tiny_runner import CONFIGS, Driver, random_prompt


def test_capture_sizes_end_at_the_most_rows() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(6) == [1, 2, 4, 6]
    assert capture_sizes(64)[-3:] == [48, 56, 64]
    for limit in (1, 7, 100, 256, 1024):
        sizes = capture_sizes(limit)
        assert sizes == sorted(set(sizes)) and sizes[-1] == min(limit, 512)
        assert all(b <= 2 * a or b <= 8 for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 11}])
def test_graph_equals_eager(architecture: str, params: dict[str, float]) -> None:
    """Token for token, with rows that come and go and a prefill between the decodes."""
    prompts = {slot: random_prompt(n, slot) for slot, n in {1: 5, 2: 33, 3: 70}.items()}
    runs = []
    for graphs in (False, True):
        driver = Driver(architecture, device="cuda")
        if graphs:
            driver.runner.capture([1, 2, 4])
        out: dict[int, list[int]] = {}
        replays = 0
        for slot, prompt in prompts.items():
            driver.add(slot, prompt, **params)
            for todo in ({slot: len(prompt)}, *[dict.fromkeys(range(1, slot + 1), 1)] * 6):
                replays += todo.keys() == set(range(1, slot + 1)) and max(todo.values()) == 1
                for row, tokens in driver.step(todo).items():
                    out.setdefault(row, []).extend(tokens)
        runs.append(out)
        assert replays == 18
        assert (driver.runner.graphs is not None) == graphs
    assert runs[0] == runs[1]
    assert len(set(np.concatenate(list(runs[0].values())))) > 3
