# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Against Python's re, on all short texts."""

import itertools
import random
import re

import pytest

from llmserve.errors import GrammarError
from llmserve.structured_output.regular import combine, matches

PATTERNS = ["a", "^a", "a$", "^a*$", "[0-9]{2,}", "X_", "a.*", "^$", "^a?b+$", "(a|bc)*0", "[^a-c]",
            "^(?:ab|c)$", "b{0,2}$", r"\w\d", r"^\S+$", "^x-", "^[a-c_][a-c0-9_]*$", "", "a*?b",
            r"^(?<n>a)\x62", "^.{2,3}$", "^(?:a{2}|b)+$"]  # fmt: skip
TEXTS = ["".join(text) for n in range(4) for text in itertools.product("abcX_0 é", repeat=n)]


def _python(pattern: str) -> re.Pattern[str]:
    pattern = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", pattern)
    return re.compile(pattern.replace("$", r"\Z").replace("(?<", "(?P<"), re.ASCII)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches(pattern: str) -> None:
    judge = _python(pattern)
    for text in TEXTS:
        assert matches(pattern, text) == bool(judge.search(text)), text


def test_combine() -> None:
    rng, empty = random.Random(), 0
    for _ in range(60):
        chosen = rng.sample(PATTERNS, 3)
        table = [rng.random() < 0.5 for _ in range(8)]

        def wanted(found: list[bool], table: list[bool] = table) -> bool:
            return table[found[0] * 4 + found[1] * 2 + found[2]]

        try:
            pattern = combine(chosen, wanted, lambda: None)
        except GrammarError as error:
            assert "too many ways" in error.message
            continue
        empty += pattern is None
        judge = None if pattern is None else _python(pattern)
        for text in rng.sample(TEXTS, 40):
            fits = judge is not None and bool(judge.search(text))
            assert fits == wanted([matches(p, text) for p in chosen]), (chosen, table, text)
    assert empty < 50


def test_what_cannot_be_said_is_no_text() -> None:
    assert combine(["a", "b"], lambda found: all(found) and not any(found), lambda: None) is None
    assert combine(["^a$", "^[^a]*$"], all, lambda: None) is None
