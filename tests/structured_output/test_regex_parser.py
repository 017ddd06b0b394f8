# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is refused; what is read: test_regular.py."""

import pytest

from llmserve.errors import GrammarError
from llmserve.structured_output.regex_parser import parse


@pytest.mark.parametrize(
    "pattern",
    ["(?=a)", "(?<!a)b", r"(a)\1", r"\bfoo", r"\p{L}", "(a", "a)", "[a", "[z-a]", "*a", "a{3,1}",
     "a{100000}", "a\\", r"\xzz", "[[:alpha:]]", "(?i)a", r"\u{zz}", "[a&&b]"],
)  # fmt: skip
def test_refused(pattern: str) -> None:
    with pytest.raises(GrammarError, match="is not understood at"):
        parse(pattern)


@pytest.mark.parametrize(
    ("pattern", "ranges"),
    [
        (r"[\]\-a-c]", ((45, 45), (93, 93), (97, 99))),
        (r"\u{1F600}", ((0x1F600, 0x1F600),)),
        (r"A", ((65, 65),)),
        (r"\cJ", ((10, 10),)),
        ("[^\\d]", ((0, 47), (58, 0x10FFFF))),
        ("[a-]", ((45, 45), (97, 97))),
        ("é", ((233, 233),)),
    ],
)
def test_set(pattern: str, ranges: tuple[tuple[int, int], ...]) -> None:
    (part,) = parse(pattern).parts
    assert part.ranges == ranges


def test_braces_that_count_nothing_are_text() -> None:
    assert [part.ranges for part in parse("a{,2}").parts][1] == ((123, 123),)
    assert [part.kind for part in parse("a{2,}?").parts] == ["repeat"]
