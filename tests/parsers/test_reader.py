# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What parsers stand on: markers, holding back, going back."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.core.outputs import Part
from llmserve.parsers.reader import LIMIT, Markers, Reader, Step, drop


def drive(reader: Reader, steps: Step[object], *pieces: str) -> list[Part]:
    """Runs a parser over pieces and its end."""
    assert next(steps, "waits") is None
    for piece in pieces:
        reader.feed(piece)
        next(steps, None)
    reader.ended = True
    assert next(steps, "done") == "done"
    reader.finish()
    return reader.take_parts()


@given(
    st.text("ab<>", max_size=30), st.sets(st.sampled_from(["<a>", "<b>", "ab<", "<<"]), min_size=1)
)
def test_markers_are_found_wherever_the_text_is_cut(text: str, names: set[str]) -> None:
    try:
        markers = Markers(names)
    except AssertionError:
        return  # one of them lies in another
    found = []
    for pieces in ([text], list(text)):
        reader = Reader(trims=False)
        seen: list[str] = []

        def run(reader: Reader = reader, seen: list[str] = seen) -> Step[None]:
            while marker := (yield from reader.until(markers, reader.content)):
                seen.append(marker)

        parts = drive(reader, run(), *pieces)
        found.append((seen, "".join(part.text for part in parts)))
    assert found[0] == found[1]
    assert sum(map(len, seen)) + len(found[0][1]) == len(text)


def test_a_marker_inside_another_is_refused() -> None:
    with pytest.raises(AssertionError):
        Markers(["<a><b>", "<a>"])
    Markers(["\n</a>", "</a>"])


def test_text_waits_only_while_it_may_begin_a_marker() -> None:
    markers = Markers(["<tool>"])
    assert [markers.unsure(text, 0) for text in ("a", "a<", "a<too", "a<toy", "<to<t")] == [
        0,
        1,
        4,
        0,
        2,
    ]


def test_what_was_recorded_is_content_after_a_rollback() -> None:
    reader = Reader(trims=True)

    def run() -> Step[None]:
        reader.record("[")
        yield from reader.until(Markers(["!"]), drop)
        reader.rollback()
        reader.record("lost")
        yield from reader.at("x")
        reader.commit()
        reader.rollback()

    assert drive(reader, run(), "ab", "c!", "x") == [Part("content", "[abc!")]


def test_a_match_is_short_or_none() -> None:
    for text, wanted in (("a" * (LIMIT - 1) + "b", LIMIT), ("a" * LIMIT + "b", None)):
        for pieces in ([text], list(text)):
            reader = Reader(trims=False)
            found = []

            def run(reader: Reader = reader, found: list[object] = found) -> Step[None]:
                match = yield from reader.match(re.compile("a+b"))
                found.append(match and len(match[0]))

            drive(reader, run(), *pieces)
            assert found == [wanted]


def test_space_around_calls_is_no_content() -> None:
    reader = Reader(trims=True)
    reader.content("a \n")
    reader.content(" ")
    reader.call("f")
    reader.arguments("{}")
    reader.content("\n")
    assert [part.kind for part in reader.take_parts()] == ["content", "call", "arguments"]
    reader.content("b")
    reader.content("\n")
    reader.finish()
    assert reader.take_parts() == [Part("content", " \n \nb\n")]


def test_half_characters_of_json_escapes_do_not_get_through() -> None:
    reader = Reader(trims=True)
    reader.call("f\ud800")
    reader.arguments('"\udfff"')
    assert [part.text for part in reader.take_parts()] == ["f\ufffd", '"\ufffd"']
