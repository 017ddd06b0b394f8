# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Beam search against transformers' generate(num_beams=...), and its rules one by one."""

import asyncio
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmserve import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from llmserve.errors import RequestError
from llmserve.frontend.beam_search import (
    Beam,
    BeamOptions,
    BeamSearch,
    BeamStream,
    Hypothesis,
    check_beam_params,
)
from llmserve.frontend.output_processor import LogprobEntry
from llmserve.frontend.parsed_text import ParsedText, Parsing
from llmserve.parsers.registry import choose_parsers
from tests.helpers.api import TOKENIZER, open_api
from tests.helpers.tiny_models import write_tiny_model

EOS = list(range(2, 110))  # so many that hypotheses end at different lengths
FLAGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "cpu_threads": 1, "kv_cache_memory_bytes": 16 << 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every third token or so is an end."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "qwen3", tie_word_embeddings=False)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": EOS}))
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **FLAGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(folder: Path) -> transformers.PreTrainedModel:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def wanted(
    model: transformers.PreTrainedModel, prompt: list[int], width: int, **settings: Any
) -> tuple[list[list[int]], list[float]]:
    """New tokens and values of transformers' hypotheses."""
    found = model.generate(
        torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False,
        eos_token_id=EOS, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        **settings,
    )  # fmt: skip
    new = [row[len(prompt) :] for row in found.sequences.tolist()]
    ends = [next((i for i, t in enumerate(row) if t in EOS), len(row)) for row in new]
    cut = [row[: end + 1] for row, end in zip(new, ends, strict=True)]
    return cut, found.sequences_scores.tolist()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_as_transformers(
    llm: LLM, reference: transformers.PreTrainedModel, length_penalty: float, early_stopping: bool
) -> None:
    settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    rng = random.Random(repr(settings))
    reasons = set()
    for width in (2, 3, 6, 9):
        prompt = [rng.randrange(110, 350) for _ in range(rng.randrange(2, 40))]
        max_tokens = rng.randrange(3, 20)
        params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, **settings)
        (output,) = llm.beam_search({"prompt_token_ids": prompt}, params)
        tokens, values = wanted(reference, prompt, width, max_new_tokens=max_tokens, **settings)
        assert [one.tokens for one in output.sequences] == [prompt + new for new in tokens]
        ours = [
            one.cum_logprob / len(new) ** length_penalty
            for one, new in zip(output.sequences, tokens, strict=True)
        ]
        # float32 logits of two implementations, summed over up to 20 tokens
        assert ours == pytest.approx(values, rel=1e-4)
        reasons |= {one.finish_reason for one in output.sequences}
    assert "stop" in reasons


def test_several_prompts_at_once_are_each_alone(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    prompts = ["The quick brown fox", "Was it", "numbers like 12345"]
    together = llm.beam_search(prompts, params)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.beam_search(prompt, params)
        for one, other in zip(output.sequences, alone.sequences, strict=True):
            assert (one.tokens, one.text) == (other.tokens, other.text)
            assert one.cum_logprob == pytest.approx(other.cum_logprob, abs=1e-3)
            assert one.text.startswith(prompt)


async def test_a_stream_gives_what_llm_gives(llm: LLM, folder: Path) -> None:
    prompt = llm.get_tokenizer().encode("The quick brown fox jumps", True)
    params = SamplingParams(n=3, max_tokens=8, logprobs=2)
    beam = BeamSearchParams(beam_width=3, max_tokens=8)
    expected = llm.beam_search({"prompt_token_ids": prompt}, beam)
    server = await AsyncLLM.launch(str(folder), **FLAGS)
    try:
        stream = BeamStream(server, prompt, params, BeamOptions(), request_id="r")
        deltas = await stream.next()
        assert await stream.next() == [] and stream.finished
        for delta, one in zip(deltas, expected[0].sequences, strict=True):
            assert prompt + delta.token_ids == one.tokens
            assert one.text.endswith(delta.text)
            assert delta.finish_reason == one.finish_reason
            assert [entry[0][0] for entry in delta.logprobs or []] == delta.token_ids
            assert sum(entry[1][0] for entry in delta.logprobs or []) == pytest.approx(
                one.cum_logprob
            )
            assert {len(entry[0]) for entry in delta.logprobs or []} == {3}
        cut = BeamStream(server, prompt, params, BeamOptions(), request_id="s")
        task = asyncio.create_task(cut.next())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert server.num_unfinished == 0
    finally:
        server.shutdown()


async def test_hypotheses_are_read_token_by_token() -> None:
    tokens = [*TOKENIZER.encode("<think>hm</think>yes", add_special_tokens=False), 257]
    entries: list[LogprobEntry] = [([token], [-1.0], 1) for token in tokens]
    parsers = choose_parsers("", "", "none", "qwen3")
    for counts in (False, True):
        parsing = Parsing(lambda: parsers.make(None, "", False), {}, counts)
        async with open_api() as api:
            assert api.state.llm is not None
            params = SamplingParams(n=1, max_tokens=99, logprobs=0)
            stream = BeamStream(
                api.state.llm, [1], params, BeamOptions(), request_id="r", parsing=parsing
            )
            beam = Beam(tokens, -1.0, entries)
            stream._search.best, stream._search.done = [Hypothesis(beam, -1.0, "stop", None)], True
            (delta,) = await stream.next()
        wanted = ParsedText(TOKENIZER, params, [1], parsing)
        wanted.feed(tokens[:-1])
        wanted.skip()
        assert (delta.token_ids, delta.logprobs, delta.finish_reason) == (tokens, entries, "stop")
        assert delta.num_reasoning == wanted.num_reasoning > 0
        if counts:
            assert delta.text == "<think>hm</think>yes"
            continue
        assert [(part.kind, part.text) for part in delta.parts] == [
            ("reasoning", "hm"), ("content", "yes")
        ]  # fmt: skip
        assert delta.text == "yes" and delta.hidden == wanted.hidden


# ---- the rules, on a made-up model of four tokens whose last is the end


def entry(**probabilities: float) -> LogprobEntry:
    """What an engine would say: the likeliest tokens, a = 0 .. d = 3, with log-probabilities."""
    pairs = sorted(((value, "abcd".index(name)) for name, value in probabilities.items()))[::-1]
    return [9, *(token for _, token in pairs)], [-99.0, *(value for value, _ in pairs)], 1


def search(n: int = 2, options: BeamOptions | None = None, **params: Any) -> BeamSearch:
    return BeamSearch(SamplingParams(n=n, **params), options or BeamOptions(), [3], 4)


def test_an_end_among_the_best_is_kept_and_others_go_on() -> None:
    made = search(max_tokens=9)
    made.advance([entry(a=-1.0, d=-1.5, b=-2.0, c=-3.0)])
    assert [beam.tokens for beam in made.live] == [[0], [1]]
    assert [(found.beam.tokens, found.finish_reason) for found in made.best] == [([3], "stop")]
    assert not made.done
    # nothing that lives can beat the two that ended: the search is over
    made.advance([entry(d=-0.1, a=-5.0, b=-5.0, c=-5.0), entry(a=-5.0, b=-5.0, c=-5.0, d=-9.0)])
    assert made.done
    assert [found.beam.tokens for found in made.best] == [[0, 3], [3]]


def test_an_end_that_is_not_among_the_best_is_dropped() -> None:
    made = search(max_tokens=9)
    made.advance([entry(a=-1.0, b=-2.0, d=-3.0, c=-4.0)])
    assert made.best == [] and len(made.live) == 2


@pytest.mark.parametrize(("early", "done"), [(True, True), (False, False)])
def test_early_stopping(early: bool, done: bool) -> None:
    made = search(1, BeamOptions(length_penalty=2.0, early_stopping=early), max_tokens=9)
    made.advance([entry(d=-5.0, a=-5.1, b=-8.0, c=-9.0)])
    # one token worth -5; a second one could give -5.1 / 4
    made = search(2, BeamOptions(length_penalty=2.0, early_stopping=early), max_tokens=9)
    made.advance([entry(d=-5.0, a=-5.1, b=-8.0, c=-9.0)])
    made.advance([entry(d=-3.0, a=-0.1, b=-8.0, c=-9.0), entry(c=-9.0, a=-10.0, b=-8.0, d=-11.0)])
    assert made.done == done


def test_fields_of_the_answer() -> None:
    made = search(max_tokens=2, min_tokens=1, stop_token_ids=[2], logprobs=1)
    made.advance([entry(d=-0.1, c=-0.2, a=-1.0, b=-2.0)])  # no end may be the first token
    assert [beam.tokens for beam in made.live] == [[0], [1]] and made.best == []
    made.advance([entry(c=-0.1, d=-9.0, a=-7.0, b=-8.0), entry(d=-0.1, a=-7.0, b=-8.0, c=-9.0)])
    assert made.done
    assert [(found.finish_reason, found.stop_reason) for found in made.best] == [
        ("stop", 2),
        ("stop", None),
    ]
    assert made.best[0].beam.logprobs == [([0, 3], [-1.0, -0.1], 3), ([2, 2], [-0.1, -0.1], 1)]
    ignoring = search(1, max_tokens=1, ignore_eos=True)
    ignoring.advance([entry(d=-0.1, a=-1.0)])
    assert ignoring.best[0].finish_reason == "length" and ignoring.best[0].beam.tokens == [3]


def test_what_beam_search_cannot_honour_is_refused() -> None:
    refused: dict[str, Any] = {
        "presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1,
        "logit_bias": {1: 1.0}, "allowed_token_ids": [1], "bad_words": ["x"], "stop": ["x"],
        "prompt_logprobs": 1, "max_tokens": 0,
    }  # fmt: skip
    for name, value in refused.items():
        with pytest.raises(RequestError) as info:
            check_beam_params(SamplingParams(**{name: value}))
        assert info.value.param == name
    check_beam_params(SamplingParams(temperature=0.5, top_p=0.5, top_k=3, min_p=0.1, seed=1))
    for values in itertools.product((0, 129), (16,)):
        with pytest.raises(RequestError, match="n must be between 1 and 128"):
            BeamSearchParams(beam_width=values[0], max_tokens=values[1]).sampling_params()
