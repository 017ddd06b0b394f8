# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Regular expressions of JSON schema (ECMA-262, without what is not regular), as trees."""

from dataclasses import dataclass
from typing import Literal

from llmserve.errors import GrammarError

MAX_CHAR = 0x10FFFF
_MAX_REPEAT = 1000
Ranges = tuple[tuple[int, int], ...]  # of code points, both ends within; sorted, disjoint


@dataclass(frozen=True, slots=True)
class Fragment:
    """`repeat` holds one part, `low` times or more, at most `high`; "start" and "end" are ^, $."""

    kind: Literal["set", "start", "end", "or", "and", "repeat"]
    parts: tuple["Fragment", ...] = ()
    ranges: Ranges = ()
    low: int = 0
    high: int | None = None


def _union(*sets: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in sets for pair in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return tuple(merged)


def _inverse(ranges: Ranges) -> Ranges:
    out, begin = [], 0
    for low, high in ranges:
        if begin < low:
            out.append((begin, low - 1))
        begin = high + 1
    return (*out, *([(begin, MAX_CHAR)] if begin <= MAX_CHAR else []))


def _points(text: str) -> Ranges:
    return _union(tuple((ord(char), ord(char)) for char in text))


_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE = _union(
    ((9, 13), (0x2000, 0x200A)), _points(" \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000")
)
_CLASSES = {
    "d": _DIGIT, "D": _inverse(_DIGIT), "w": _WORD, "W": _inverse(_WORD),
    "s": _SPACE, "S": _inverse(_SPACE),
}  # fmt: skip
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0, "a": 7}
_DOT = _inverse(_points("\n"))


def parse(pattern: str) -> Fragment:
    """GrammarError for look-around, back references, \\b, \\p and whatever is malformed."""
    parser = _Parser(pattern)
    found = parser.alternatives()
    if parser.place < len(pattern):
        raise parser.error()
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def error(self) -> GrammarError:
        return GrammarError(f"the pattern {self.text[:100]!r} is not understood at {self.place}")

    def _peek(self, text: str) -> bool:
        return self.text.startswith(text, self.place)

    def _skip(self, text: str) -> bool:
        found = self._peek(text)
        self.place += len(text) * found
        return found

    def _next(self) -> str:
        if self.place >= len(self.text):
            raise self.error()
        self.place += 1
        return self.text[self.place - 1]

    def alternatives(self) -> Fragment:
        options = [self._sequence()]
        while self._skip("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Fragment("or", tuple(options))

    def _sequence(self) -> Fragment:
        parts: list[Fragment] = []
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            parts.append(self._repeated(self._atom()))
        return Fragment("and", tuple(parts))

    def _atom(self) -> Fragment:
        char = self._next()
        match char:
            case "^":
                return Fragment("start")
            case "$":
                return Fragment("end")
            case "(":
                if self._skip("?:"):
                    pass
                elif self._skip("?<") and not (self._peek("=") or self._peek("!")):
                    self.place = self.text.find(">", self.place) + 1 or len(self.text)
                elif self._peek("?") or self.text[self.place - 1] != "(":
                    raise self.error()
                found = self.alternatives()
                if not self._skip(")"):
                    raise self.error()
                return found
            case ".":
                return Fragment("set", ranges=_DOT)
            case "[":
                return Fragment("set", ranges=self._brackets())
            case "\\":
                return Fragment("set", ranges=self._escape())
            case "*" | "+" | "?":
                self.place -= 1
                raise self.error()
        return Fragment("set", ranges=_points(char))

    def _repeated(self, inner: Fragment) -> Fragment:
        while self.place < len(self.text):
            before = self.place
            if self._skip("*"):
                low, high = 0, None
            elif self._skip("+"):
                low, high = 1, None
            elif self._skip("?"):
                low, high = 0, 1
            elif self._peek("{") and (bounds := self._bounds()):
                low, high = bounds
            else:
                return inner
            self._skip("?")  # lazy: the same texts
            if low > _MAX_REPEAT or (high or 0) > _MAX_REPEAT or (high is not None and high < low):
                self.place = before
                raise self.error()
            inner = Fragment("repeat", (inner,), low=low, high=high)
        return inner

    def _bounds(self) -> tuple[int, int | None] | None:
        end = self.text.find("}", self.place)
        low, comma, high = self.text[self.place + 1 : max(end, 0)].partition(",")
        if not low.isdecimal() or not (high.isdecimal() or not high):
            return None
        self.place = end + 1
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None

    def _brackets(self) -> Ranges:
        is_inverse, found = self._skip("^"), list[Ranges]()
        while not self._skip("]"):
            low = self._member()
            if self._peek("-") and not self._peek("-]"):
                self.place += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or low[0][0] > high[0][1]:
                    raise self.error()
                low = ((low[0][0], high[0][1]),)
            found.append(low)
        ranges = _union(*found)
        return _inverse(ranges) if is_inverse else ranges

    def _member(self) -> Ranges:
        char = self._next()
        if char == "\\":
            return ((8, 8),) if self._skip("b") else self._escape()
        if char == "[" and self._peek(":") or char == "&" and self._peek("&"):
            raise self.error()  # classes that other dialects know
        return _points(char)

    def _escape(self) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _CONTROLS:
            return ((_CONTROLS[char],) * 2,)
        if char in "xu":
            size = 2 if char == "x" else 4
            digits = self.text[self.place : self.place + size]
            if self._skip("{"):
                end = self.text.find("}", self.place)
                digits = self.text[self.place : max(end, 0)]
                size = len(digits) + 1
            try:
                code = int(digits, 16)
            except ValueError:
                raise self.error() from None
            self.place += size
            return ((code, code),)
        if char == "c" and self._peek_letter():
            code = ord(self._next()) % 32
            return ((code, code),)
        if char.isalnum():
            raise self.error()
        return _points(char)

    def _peek_letter(self) -> bool:
        return (
            self.place < len(self.text)
            and self.text[self.place].isascii()
            and (self.text[self.place].isalpha())
        )
