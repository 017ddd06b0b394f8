# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from pathlib import Path

import pytest

from llmserve.cli.bench import datasets
from llmserve.cli.client import Client
from llmserve.errors import ConfigError
from tests.helpers.fake_openai import fake_openai


def test_random_prompts_have_the_asked_lengths() -> None:
    drawn = datasets.random_ids(list(range(1000)), 50, 64, 16, 8, 0.0, 1)
    assert {(len(ids), out) for ids, out in drawn} == {(72, 16)}
    assert len({tuple(ids[:8]) for ids, _ in drawn}) == 1
    assert len({tuple(ids[8:]) for ids, _ in drawn}) == 50
    assert drawn == datasets.random_ids(list(range(1000)), 50, 64, 16, 8, 0.0, 1)
    assert drawn != datasets.random_ids(list(range(1000)), 50, 64, 16, 8, 0.0, 2)
    lengths = [len(ids) for ids, _ in datasets.random_ids([1], 500, 100, 16, 0, 0.5, 1)]
    assert min(lengths) >= 50 and max(lengths) <= 150 and max(lengths) - min(lengths) > 80


def test_vocabulary_and_text_come_from_the_server() -> None:
    with fake_openai() as server:
        client = Client(server.url)
        vocabulary = datasets.vocabulary_of(client, "m")
        assert len(vocabulary) == 26**2
        assert datasets.as_text(client, "m", [5, 6]) == "t5 t6"
    with pytest.raises(ConfigError, match="random needs the server's /tokenize"):
        datasets.vocabulary_of(client, "m")


def test_custom_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "output_tokens": 3}\n')
    samples = datasets.custom(str(path), 3, 10)
    assert samples == [
        datasets.Sample("a", 10), datasets.Sample("b", 3), datasets.Sample("a", 10)
    ]  # fmt: skip
    path.write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match="each line must be"):
        datasets.custom(str(path), 3, 10)
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        datasets.custom(str(path), 3, 10)
    with pytest.raises(ConfigError, match="No such file"):
        datasets.custom(str(tmp_path / "none"), 3, 10)
