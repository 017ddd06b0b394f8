# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import numpy as np
import pytest
import torch

from llmserve.kernels.gumbel import row_keys
from llmserve.sampling import draw as draw_module
from llmserve.sampling.base import SamplerContext
from llmserve.sampling.truncation import Limits, Truncation
from tests.helpers.sampling import new_request

WIDTH = 3000


def _inputs(n: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Limits]:
    rng = np.random.default_rng()
    truncation = Truncation(SamplerContext(n, WIDTH, torch.device("cpu"), []))
    choices = [
        {"top_k": 40}, {"top_k": 1500}, {"top_p": 0.5}, {"top_p": 0.95}, {"min_p": 0.05},
        {"top_k": 100, "top_p": 0.9}, {"min_p": 0.001, "top_p": 0.99}, {"top_k": 1},
    ]  # fmt: skip
    for slot in range(n):
        truncation.add(slot, new_request(slot, [0], **choices[slot % len(choices)]))
    scale = rng.choice([0.3, 1, 4], (n, 1))
    logits = torch.from_numpy(rng.normal(size=(n, WIDTH)) * scale).float()
    logits[::2] = logits[::2].bfloat16().float()
    temperature = torch.from_numpy(rng.uniform(0.3, 2, (n, 1))).float()
    keys = row_keys(torch.from_numpy(rng.integers(-(2**62), 2**62, n)), torch.arange(n))
    return logits, temperature, keys, truncation.limits(np.arange(n))


def test_prefix_and_wide_draw_the_same_token_from_the_same_set() -> None:
    logits, temperature, keys, limits = _inputs()
    wide = draw_module.draw_wide(logits, temperature, keys, limits)
    levels: list[tuple[int, ...]] = [(64, 1024), (2, 16, 128), (1024,), (WIDTH,), ()]
    for sizes in levels:
        prefix = draw_module._draw_prefix(logits, temperature, keys, limits, sizes)
        assert torch.equal(prefix.token_ids, wide.token_ids)
        assert torch.equal(prefix.score, wide.score)
        assert torch.equal(prefix.lowest, wide.lowest)


def test_all_levels_of_the_prefix_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = draw_module.draw_wide
    monkeypatch.setattr(
        draw_module, "draw_wide", lambda *args: seen.append(len(args[0])) or real(*args)
    )
    monkeypatch.setattr(draw_module, "_PREFIXES", (64, 512))
    logits, temperature, keys, limits = _inputs()
    draw_module.draw(logits, temperature, keys, limits)
    assert len(seen) == 1
    assert 0 < seen[0] < len(logits)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, temperature, keys, _ = _inputs()
    alone = draw_module.draw_wide(logits, temperature, keys, None)
    monkeypatch.setattr(draw_module, "_CHUNK", 7 * WIDTH)
    assert torch.equal(
        draw_module.draw_wide(logits, temperature, keys, None).token_ids, alone.token_ids
    )


def test_equal_scores_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        draw_module, "gumbel", lambda keys, ids: torch.zeros(keys.shape[0], 1) + 0.0 * ids
    )
    logits, temperature, keys, limits = _inputs()
    logits = logits.round()
    expected = logits.max(1).indices
    for tokens in (
        draw_module.draw(logits, temperature, keys, None).token_ids,
        draw_module.draw(logits, temperature, keys, limits).token_ids,
        draw_module.draw_wide(logits, temperature, keys, limits).token_ids,
    ):
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_draws_do_not_depend_on_the_batch(scale: float) -> None:
    logits, temperature, keys, limits = _inputs()
    logits = logits * scale
    whole = draw_module.draw(logits, temperature, keys, limits)
    for i in range(0, len(logits), 5):
        row = slice(i, i + 1)
        alone = draw_module.draw(logits[row], temperature[row], keys[row], limits.take(row))
        assert alone.token_ids[0] == whole.token_ids[i]
        assert alone.score[0] == whole.score[i]
