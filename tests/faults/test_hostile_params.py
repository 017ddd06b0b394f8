# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T02 behind the frontend's back: what passes the checks of the wire can harm no other request."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import RequestError
from tests.helpers.engine import Engine

WIDTH = 384
INT64 = 2**63 - 1
VALUES: dict[str, list[Any]] = {
    "n": [1, 128],
    "temperature": [0.0, 5e-324, 1e-300, 1e-9, 2.0],
    "top_p": [5e-324, 1e-9, 1.0],
    "top_k": [0, -1, 1, WIDTH, WIDTH + 1, INT64],
    "min_p": [0.0, 5e-324, 1.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [5e-324, 1e-30, 1e30, 1.7e308],
    "logit_bias": [{0: 1.7e308}, {WIDTH - 1: -1.7e308}, dict.fromkeys(range(WIDTH), -100.0)],
    "allowed_token_ids": [[0], [WIDTH - 1] * 1000, list(range(WIDTH))],
    "bad_words_token_ids": [[[]], [[1, 2, 3]], [[5]] * 500, [[i] for i in range(WIDTH)]],
    "seed": [-(2**63), INT64, 0, -1],
    "stop_token_ids": [[0], list(range(WIDTH)), [7] * 10_000],
    "min_tokens": [0, 3, INT64],
    "max_tokens": [None, 0, 1, 5, INT64],
    "logprobs": [-1, 0, 20, WIDTH],
    "prompt_logprobs": [-1, 0, 20, WIDTH],
    "extra_args": [{"x": [1] * 1000}],
}


@pytest.fixture(scope="module")
def engine(bench_model: Path) -> Iterator[Engine]:
    made = Engine(bench_model, max_model_len=256, num_gpu_blocks_override=64, max_num_seqs=8)
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(4))
def test_extreme_parameters_beside_a_plain_request(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    alone = engine.generate([[9, 8, 7]], max_tokens=40)[0]
    plain = engine.add([9, 8, 7], max_tokens=40)
    added = 0
    for _ in range(60):
        names = rng.sample(list(VALUES), rng.randrange(1, 5))
        fields = {name: rng.choice(VALUES[name]) for name in names}
        prompt = [rng.randrange(WIDTH) for _ in range(rng.choice((1, 16, 60)))]
        try:
            SamplingParams(**({"max_tokens": 16} | fields))
        except RequestError:  # by the parameters' own check, which the wire makes, too
            continue
        engine.add(prompt, **fields)
        added += 1
        engine.step()
    assert added > 30
    engine.run()
    assert engine.results[plain].token_ids == alone
    assert all(result.finish_reason is not None for result in engine.results.values())
