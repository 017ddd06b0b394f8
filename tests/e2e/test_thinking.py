# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Budgets of reasoning, however requests are scheduled: what a parser calls reasoning stays within
them, and the same tokens come of every way to run."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.frontend.parsed_text import ParsedText, Parsing
from llmserve.frontend.thinking import make_budget
from llmserve.frontend.tokenizer import Tokenizer, load_tokenizer
from llmserve.parsers.base import OutputParser
from llmserve.parsers.reasoning.think import Think
from llmserve.structured_output.prepare import prepare
from tests.helpers.engine import Engine, engines_of
from tests.helpers.tiny_models import write_tiny_model

PROMPT = list(range(5, 25))
OPENED = "<think>\n"
BUDGETS = (0, 1, 2, 7, 20, 500)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(folder, "llama", seed=4, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Callable[..., Engine]]:
    with engines_of(model) as get:
        yield get


def _run(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int] = PROMPT, **fields: Any
) -> list[list[int]]:
    fields = {"temperature": 1.0, "max_tokens": 60} | fields
    ids = [
        engine.add(
            prompt,
            **fields,
            seed=seed,
            reasoning_budget=make_budget(tokenizer, Think(OPENED, False), (), tokens),
        )
        for seed, tokens in enumerate(BUDGETS)
    ]
    engine.run()
    assert engine.core.grammars is not None and not engine.core.grammars._walks
    return [engine.results[i].token_ids for i in ids]


def _num_reasoning(tokenizer: Tokenizer, tokens: list[int]) -> int:
    parsing = Parsing(lambda: OutputParser(Think(OPENED, False), None), {})
    text = ParsedText(tokenizer, SamplingParams(), [], parsing)
    text.feed(tokens)
    return text.num_reasoning


def test_reasoning_ends_in_time(engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    one = engine()
    ending = tokenizer.encode("</think>", add_special_tokens=False)
    masks = one.core.grammars.num_masks  # type: ignore[union-attr]
    outputs = _run(one, tokenizer)
    for budget, tokens in zip(BUDGETS, outputs, strict=True):
        assert tokens[budget : budget + len(ending)] == (ending if budget < 60 else [])
        assert len(tokens) == 60
        counted = _num_reasoning(tokenizer, tokens)
        assert min(budget, 60) <= counted <= budget + len(ending) - 1
    assert one.core.stats().max_in_flight == 2
    # No mask where nothing is near its end: 500 tokens never are
    assert 0 < one.core.grammars.num_masks - masks < 60 * len(BUDGETS)  # type: ignore[union-attr]


def test_every_way_to_run_gives_the_same(
    engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    prompt = random.choices(range(5, 120), k=70)
    wanted = _run(engine(), tokenizer, prompt)
    assert _run(engine(async_scheduling=False), tokenizer, prompt) == wanted
    small = engine(max_num_batched_tokens=16)
    assert _run(small, tokenizer, prompt) == wanted
    assert small.core.stats().num_chunked_prefills > 0
    tight = engine(num_gpu_blocks_override=14, max_model_len=160)
    assert _run(tight, tokenizer, prompt) == wanted
    assert tight.core.stats().num_preemptions > 0


def test_a_forced_end_is_never_forbidden(
    engine: Callable[..., Engine], tokenizer: Tokenizer
) -> None:
    """Beside what biases and penalties say, and with an end of text that may not come yet."""
    ending = tokenizer.encode("</think>", add_special_tokens=False)
    outputs = _run(
        engine(),
        tokenizer,
        logit_bias=dict.fromkeys(ending, -100.0),
        presence_penalty=2.0,
        min_tokens=30,
        ignore_eos=False,
    )
    for budget, tokens in zip(BUDGETS[:-1], outputs, strict=False):
        assert tokens[budget : budget + len(ending)] == ending


def test_a_grammar_goes_on_behind_it(engine: Callable[..., Engine], tokenizer: Tokenizer) -> None:
    thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"}
    tag = {"type": "sequence", "elements": [thought, {"type": "regex", "pattern": "[xyz]{5}"}]}
    spec = prepare(StructuredOutputsParams(structural_tag={"format": tag}), "auto")
    outputs = _run(engine(), tokenizer, grammar=spec, ignore_eos=False)
    for budget, tokens in zip(BUDGETS[:-1], outputs, strict=False):
        reasoning, closer, answer = tokenizer.decode(tokens).partition("</think>")
        assert closer and len(answer) == 5 and set(answer) <= set("xyz"), (budget, answer)
        assert len(tokenizer.encode(reasoning)) <= budget or "\ufffd" in reasoning
