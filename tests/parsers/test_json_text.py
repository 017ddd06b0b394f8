# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""JSON as it comes."""

import json
from typing import Any

import pytest
from hypothesis import given

from llmserve.parsers.json_text import as_arguments, dumps, loads, read_string, read_value
from llmserve.parsers.reader import Reader, Step
from tests.helpers.parsers import VALUES


def read(text: str, *, cut: bool) -> tuple[bool, str, str]:
    """Whether a value is at the start of `text`, what of it was read, and what is left."""
    reader = Reader(trims=False)
    pieces: list[str] = []
    result: list[bool] = []

    def run() -> Step[None]:
        result.append((yield from read_value(reader, pieces.append)))

    steps = run()
    next(steps)
    for piece in text if cut else [text]:
        reader.feed(piece)
        next(steps, None)
    reader.ended = True
    next(steps, None)
    return result[0], "".join(pieces), reader.text[reader.pos :]


@given(VALUES)
def test_a_value_is_read_as_it_is_and_no_further(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    whole = read(text + "</x>", cut=False)
    assert whole == (True, text, "</x>")
    assert read(text + "</x>", cut=True)[:2] == whole[:2]


@pytest.mark.parametrize(
    ("text", "rest"),
    [("[1}", "}"), ('{"a": <', "<"), ("{'a'", "'a'"), ("[", ""), ('"x', ""), ("", ""), ("<", "<")],
)
def test_broken_values_end_where_they_break(text: str, rest: str) -> None:
    whole, _, left = read(text, cut=False)
    assert (whole, left) == (False, rest)
    assert read(text, cut=True)[0] is False


def test_raw_control_characters_in_strings_are_escaped() -> None:
    for cut in (False, True):
        assert read('"a\nb\t\\n"', cut=cut)[:2] == (True, '"a\\nb\\t\\n"')


def test_a_string_is_a_string() -> None:
    for text, wanted in (('"a\\u00e9"', "aé"), ("5", None), ('"\\x"', None)):
        reader = Reader(trims=False)
        reader.feed(text)
        reader.ended = True
        steps = read_string(reader)
        with pytest.raises(StopIteration) as stop:
            next(steps)
        assert stop.value.value == wanted


def test_numbers_that_json_cannot_hold_are_none() -> None:
    assert [loads(text) for text in ("NaN", "1e999", "-Infinity", "[" * 100000)] == [None] * 4
    with pytest.raises(ValueError):
        dumps(float("inf"))
    assert dumps({"é": [1.5]}) == '{"é": [1.5]}'


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ('{"a":1}', '{"a":1}'), ('"{\\"a\\": 1}"', '{"a": 1}'), ('""', "{}"), ("null", "{}"),
        ('"x"', None), ("[1]", None), ("5", None), ("{", None),
    ],
)  # fmt: skip
def test_arguments_in_odd_forms(raw: str, wanted: str | None) -> None:
    assert as_arguments(raw) == wanted
