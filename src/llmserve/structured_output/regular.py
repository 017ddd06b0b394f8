# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Regular expressions as sets of texts: which hold a text, and one that says "these but not those".

Grammar engines read no complement. Thompson's automata, the subset construction over several
expressions at once, Moore's minimization, and elimination of states back to an expression.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

from llmserve.errors import GrammarError
from llmserve.structured_output.regex_parser import MAX_CHAR, Fragment, Ranges, parse

_MAX_STATES = 400
_MAX_ELIMINATED = 48
_MAX_CHARS = 20_000
_NONE = ""  # of an expression: no text at all. The empty text is "()".
_EMPTY = "()"


class _Automaton:
    """Of one expression, which may match anywhere in the text."""

    def __init__(self, pattern: str) -> None:
        self.steps: list[list[tuple[Ranges, int]]] = []
        self.free: list[list[int]] = []
        self.at_start: list[list[int]] = []
        self.at_end: list[list[int]] = []
        self.final = self._state()
        self.begin = self._state()
        self._build(parse(pattern), self.begin, self.final)

    def _state(self) -> int:
        for table in (self.steps, self.free, self.at_start, self.at_end):
            table.append([])
        if len(self.steps) > 20 * _MAX_STATES:
            raise GrammarError("the pattern is too large to be turned around")
        return len(self.steps) - 1

    def _build(self, part: Fragment, begin: int, end: int) -> None:
        match part.kind:
            case "set":
                self.steps[begin].append((part.ranges, end))
            case "start":
                self.at_start[begin].append(end)
            case "end":
                self.at_end[begin].append(end)
            case "or":
                for option in part.parts:
                    self._build(option, begin, end)
            case "and":
                for item in part.parts:
                    after = self._state()
                    self._build(item, begin, after)
                    begin = after
                self.free[begin].append(end)
            case "repeat":
                self._repeat(part, begin, end)

    def _repeat(self, part: Fragment, begin: int, end: int) -> None:
        (inner,) = part.parts
        for _ in range(part.low):
            after = self._state()
            self._build(inner, begin, after)
            begin = after
        if part.high is None:
            loop = self._state()
            self.free[begin].append(loop)
            self._build(inner, loop, loop)
            begin = loop
        else:
            for _ in range(part.high - part.low):
                after = self._state()
                self.free[begin].append(end)
                self._build(inner, begin, after)
                begin = after
        self.free[begin].append(end)

    def closure(self, states: Iterable[int], *, start: bool = False, end: bool = False) -> set[int]:
        found, todo = set[int](), list(states)
        while todo:
            state = todo.pop()
            if state not in found:
                found.add(state)
                todo += self.free[state]
                todo += self.at_start[state] if start else ()
                todo += self.at_end[state] if end else ()
        return found

    def first(self) -> frozenset[int]:
        return frozenset(self.closure([self.begin], start=True))

    def after(self, states: frozenset[int], char: int) -> frozenset[int]:
        if self.final in states:  # it has matched: what follows does not matter
            return frozenset([self.final])
        found = [target for state in states for ranges, target in self.steps[state]
                 if any(low <= char <= high for low, high in ranges)]  # fmt: skip
        return frozenset(self.closure([self.begin, *found]))

    def matched(self, states: frozenset[int], *, empty: bool) -> bool:
        return self.final in self.closure(states, end=True, start=empty)


@lru_cache(256)
def _automaton(pattern: str) -> _Automaton:
    return _Automaton(pattern)


def matches(pattern: str, text: str) -> bool:
    """Whether it matches anywhere in `text`. GrammarError for what parse refuses."""
    made = _automaton(pattern)
    states = made.first()
    for char in text:
        states = made.after(states, ord(char))
    return made.matched(states, empty=not text)


def combine(
    patterns: list[str], wanted: Callable[[list[bool]], bool], tick: Callable[[], None]
) -> str | None:
    """An anchored expression of the texts for which `wanted` is true of what each of `patterns`
    matches; None if there are none. GrammarError for what is too large or cannot be parsed.
    """
    made = [_automaton(pattern) for pattern in patterns]
    classes = _classes(made)
    start = tuple(one.first() for one in made)
    numbers = {start: 0}
    order, table, accepts = [start], list[list[int]](), list[bool]()
    for number, states in enumerate(order):  # which grows
        tick()
        if number >= _MAX_STATES:
            raise GrammarError("the patterns meet in too many ways")
        pairs = list(zip(made, states, strict=True))
        accepts.append(wanted([one.matched(own, empty=number == 0) for one, own in pairs]))
        row = []
        for ranges in classes:
            target = tuple(one.after(own, ranges[0][0]) for one, own in pairs)
            if target not in numbers:
                numbers[target] = len(order)
                order.append(target)
            row.append(numbers[target])
        table.append(row)
    text = _eliminate(*_minimal(table, accepts), classes, tick)
    if text == _NONE:
        return None
    if len(text) > _MAX_CHARS:
        raise GrammarError("the patterns meet in too many ways")
    return f"^(?:{text})$"


def _classes(made: list[_Automaton]) -> list[Ranges]:
    """Sets of characters that no expression tells apart."""
    edges = {0, MAX_CHAR + 1, 0xD800, 0xE000}
    for one in made:
        for steps in one.steps:
            for ranges, _ in steps:
                for low, high in ranges:
                    edges |= {low, high + 1}
    points = sorted(edges)
    sets = list(dict.fromkeys(ranges for one in made for row in one.steps for ranges, _ in row))
    found: dict[tuple[bool, ...], list[tuple[int, int]]] = {}
    for low, after in zip(points, points[1:], strict=False):
        if low == 0xD800:  # surrogates are no characters
            continue
        key = tuple(any(a <= low <= b for a, b in ranges) for ranges in sets)
        found.setdefault(key, []).append((low, after - 1))
    return [tuple(ranges) for ranges in found.values()]


def _minimal(table: list[list[int]], accepts: list[bool]) -> tuple[list[list[int]], list[bool]]:
    """The same with as few states as can be, the first one first."""
    kinds = [int(flag) for flag in accepts]
    while True:
        keys = [(kinds[i], *(kinds[target] for target in row)) for i, row in enumerate(table)]
        numbers: dict[tuple[int, ...], int] = {}
        new = [numbers.setdefault(key, len(numbers)) for key in keys]
        if len(numbers) == len(set(kinds)):
            break
        kinds = new
    chosen = {kind: i for i, kind in reversed(list(enumerate(new)))}
    rows = [[new[target] for target in table[chosen[kind]]] for kind in range(len(numbers))]
    return rows, [accepts[chosen[kind]] for kind in range(len(numbers))]


def _eliminate(
    table: list[list[int]], accepts: list[bool], classes: list[Ranges], tick: Callable[[], None]
) -> str:
    """State 0 is the first. States that lead nowhere are left out."""
    alive = {i for i, flag in enumerate(accepts) if flag}
    while more := {i for i, row in enumerate(table) if i not in alive and alive & set(row)}:
        alive |= more
    if 0 not in alive:
        return _NONE
    if len(alive) > _MAX_ELIMINATED:
        raise GrammarError("the patterns meet in too many ways")
    begin, end = -1, -2
    edges: dict[tuple[int, int], str] = {(begin, 0): _EMPTY}
    for i in alive:
        for target in set(table[i]) & alive:
            parts = [r for ranges, t in zip(classes, table[i], strict=True) if t == target
                     for r in ranges]  # fmt: skip
            edges[i, target] = _class(parts)
        if accepts[i]:
            edges[i, end] = _EMPTY
    left = set(alive)
    while left:
        tick()
        state = min(left, key=lambda s: _cost(edges, s))
        left.remove(state)
        loop = edges.pop((state, state), _NONE)
        again = f"(?:{loop})*" if loop else ""
        sources = [(a, text) for (a, b), text in edges.items() if b == state]
        targets = [(b, text) for (a, b), text in edges.items() if a == state]
        edges = {pair: text for pair, text in edges.items() if state not in pair}
        for a, before in sources:
            for b, after in targets:
                path = "".join(_group(p) for p in (before, again, after) if p not in (_EMPTY, ""))
                path = path or _EMPTY
                old = edges.get((a, b), _NONE)
                edges[a, b] = f"{old}|{path}" if old else path
                if len(edges[a, b]) > _MAX_CHARS:
                    raise GrammarError("the patterns meet in too many ways")
    return edges.get((begin, end), _NONE)


def _cost(edges: dict[tuple[int, int], str], state: int) -> int:
    into = sum(b == state != a for a, b in edges)
    out = sum(a == state != b for a, b in edges)
    return into * out


def _group(text: str) -> str:
    return f"(?:{text})" if "|" in text else text


def _class(ranges: list[tuple[int, int]]) -> str:
    merged: list[list[int]] = []
    for low, high in sorted(ranges):
        if merged and low == merged[-1][1] + 1:
            merged[-1][1] = high
        else:
            merged.append([low, high])
    return "[" + "".join(_range(low, high) for low, high in merged) + "]"


def _range(low: int, high: int) -> str:
    return _char(low) if low == high else f"{_char(low)}-{_char(high)}"


def _char(code: int) -> str:
    return chr(code) if code < 128 and chr(code).isalnum() else f"\\x{{{code:x}}}"
