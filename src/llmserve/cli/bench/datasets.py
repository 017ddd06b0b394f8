# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What `bench serve` sends."""

import itertools
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.cli.client import Client
from llmserve.errors import ConfigError, LLMServeError

# Two letters a word: most of them are tokens of their own in every vocabulary.
_WORDS = " ".join("".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2))


@dataclass(frozen=True)
class Sample:
    """One prompt, as text or token ids, and how many tokens to ask for."""

    prompt: str | list[int]
    output_tokens: int


def random_ids(
    vocabulary: list[int],
    count: int,
    input_len: int,
    output_len: int,
    prefix_len: int,
    range_ratio: float,
    seed: int,
) -> list[tuple[list[int], int]]:
    """`count` random prompts with a common prefix, each length drawn from +-`range_ratio`."""
    draw = random.Random(seed)
    prefix = draw.choices(vocabulary, k=prefix_len)

    def length(mean: int) -> int:
        low, high = int(mean * (1 - range_ratio)), int(mean * (1 + range_ratio))
        return max(1, draw.randint(low, high))

    return [
        (prefix + draw.choices(vocabulary, k=length(input_len)), length(output_len))
        for _ in range(count)
    ]


def vocabulary_of(client: Client, model: str) -> list[int]:
    """Token ids of plain words, asked of the server's /tokenize."""
    body = {"model": model, "prompt": _WORDS, "add_special_tokens": False}
    try:
        tokens = client.call("POST", "/tokenize", body)["tokens"]
    except (LLMServeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--dataset-name random needs the server's /tokenize ({error}); "
            "--dataset-name custom does not"
        ) from None
    return sorted(set(tokens))


def as_text(client: Client, model: str, ids: list[int]) -> str:
    """Token ids as the text that a chat message can carry."""
    answer: dict[str, Any] = client.call("POST", "/detokenize", {"model": model, "tokens": ids})
    return str(answer["prompt"])


def custom(path: str, count: int, output_len: int) -> list[Sample]:
    """JSON lines with `prompt` and perhaps `output_tokens`; repeated where there are too few."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        samples = [Sample(row["prompt"], int(row.get("output_tokens", output_len))) for row in rows]
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f'--dataset-path {path}: each line must be {{"prompt": ...}}') from None
    if not samples:
        raise ConfigError(f"--dataset-path {path} is empty")
    return list(itertools.islice(itertools.cycle(samples), count))
