# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import re

import pytest

from llmserve.structured_output.regex import ascii_classes

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
