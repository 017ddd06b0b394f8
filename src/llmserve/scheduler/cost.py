# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of a prompt fits into a step without holding up those who decode."""

import math
from collections import defaultdict, deque
from statistics import median_high

import msgspec

_TIMES = 2.5  # a step without prompts; some take longer than was foreseen and stay under 3
_SLACK = 1.1  # times that, for the sake of more tokens
_SHARE = 1.75  # times all that does not depend on the prompts' tokens: prompts get three sevenths
_EATEN = 0.85  # of the limit: so much does not depend on tokens that few have room
_WORTH = 0.45  # a step beyond the limit may be longer by this power of what its prompts weigh more
_FIRST = 2  # times `least`: of a prompt while nothing is known
_DECODES, _PROMPTS = 15, 5  # steps of a size that are remembered
_LIGHT = 12  # of so many steps one has half the tokens, which tells what does not depend on them
_PATIENCE = 4  # steps until a size is tried again: what it took is not known before
_PAUSE = 8  # steps after which a size's last one alone still counts
_FRESH = 64  # steps that tell what does not depend on the tokens
_AGE = 256  # steps after which a size is tried again, if smaller ones say that it fits
_NEAR = 1.5  # times the weight of a token, up to which steps are compared
# Of what a size takes, as much at most may not depend on the tokens: more of them never come free.
# To a larger size, which is tried but once; and within a size, or from another context
_MOST_FIXED, _SURE_FIXED = 0.9, 0.5


class Room(msgspec.Struct):
    """What prompts may have of a step: so many tokens, and of that weight at most."""

    tokens: int
    weight: float


_ANY = Room(1 << 40, 1e12)


class _Size:
    """What is known of steps with up to a power of two of tokens, some of them of prompts."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, float]] = deque(maxlen=_PROMPTS)  # seconds, weight
        self.seconds = self.weight = 0.0  # of the one in the middle
        self.density = 0.0  # weight of a token in the last one
        self.seen = self.tried = -_AGE  # numbers of steps

    def add(self, seconds: float, weight: float) -> None:
        self.steps.append((seconds, weight))
        self.seconds, self.weight = median_high(self.steps)

    def is_near(self, density: float) -> bool:
        return 1 / _NEAR < self.density / density < _NEAR


class StepCosts:
    """Learns what steps take from those that have run.

    A step of decodes has its own time for each number of rows, to a quarter; where it is not known,
    a step goes without prompts. Prompts add a time that does not depend on their tokens, and one
    for each of them; a token at position p weighs 1 + p * `context_cost`, which is what attention
    to one more token costs in units of all that does not depend on the context. Steps of about as
    many tokens are seen for themselves: larger ones may be run in another way and take several
    times as long. Smaller ones only tell whether to try them. All are medians: a stall says
    nothing.

    `most` seconds may a step take; None is 2.5 times the one without prompts, or more where prompts
    would hardly get on. The first prompt gets on by `least` tokens, whatever they cost: kernels
    work on tiles of so many.
    """

    def __init__(self, most: float | None, context_cost: float, least: int = 64) -> None:
        self.least = least
        self._most = most
        self._context_cost = context_cost
        self._decodes: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_DECODES))
        self._times: dict[int, float] = {}  # their medians, as far as they were asked for
        self._waited: dict[int, int] = {}  # number of the step without prompts, for their sake
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)  # by bits of the most tokens
        self._fixed, self._fixed_at = 0.0, 1.0  # seconds; weight of a token where they were seen
        self._num_prompts = self._num_rooms = 0  # steps

    def weight(self, start: int, count: int) -> float:
        """Of the `count` tokens from position `start` on."""
        return count * (1 + self._context_cost * (start + count / 2))

    def fit(self, start: int, room: float) -> int:
        """How many tokens from position `start` on weigh at most `room`."""
        first = 1 + self._context_cost * start
        root = math.sqrt(first * first + 2 * self._context_cost * room)
        return int(2 * room / (first + root))

    def room(self, num_decodes: int, start: int) -> Room:
        """What a step beside `num_decodes` others may have of prompts, the first of which goes on
        at position `start`."""
        alone = self._alone(num_decodes)
        if not alone:
            return _ANY
        self._num_rooms += 1
        rows = _rounded(num_decodes)
        if rows not in self._decodes and self._num_rooms - self._waited.get(rows, 0) > _PATIENCE:
            self._waited[rows] = self._num_rooms
            return Room(0, 0.0)
        tokens = self._tokens(num_decodes, start, alone)
        if self._num_rooms % _LIGHT == 0:
            tokens = max(tokens // 2, 1)
        return Room(tokens, self.weight(start, tokens) * (1 + 1e-9))

    def _tokens(self, num_decodes: int, start: int, alone: float) -> int:
        """A multiple of `least`. Goes up from size to size, as long as they are short enough."""
        tokens = least = self.least
        if not self._num_prompts:
            return _FIRST * least
        most = self._most - alone if self._most else (_TIMES - 1) * alone
        number = (num_decodes + least - 1).bit_length()
        weight, (fixed, each) = self.weight(start, least), self._line(number)
        more = fixed + each * weight
        beyond = 0.0
        if not self._most:
            beyond = _SHARE * (alone + min(self._fixed, _MOST_FIXED * more)) - alone
        is_eaten = self._fixed > _EATEN * most
        if more <= most and not is_eaten:
            beyond = min(beyond, _SLACK * (alone + most) - alone)
        while True:
            top = ((1 << number) - num_decodes) // least * least
            if top > tokens:
                fixed, each = self._line(number)
                fits = min(self._fit(start, most - fixed, each), top)
                is_known = self._is_known(number)
                if fits <= tokens:
                    fits = min(self._fit(start, beyond - fixed, each), top)
                    heavier = self.weight(start, fits)
                    if (
                        fits <= tokens
                        or not self._size_of(num_decodes + tokens).is_near(weight / tokens)
                        or alone + fixed + each * heavier
                        > (alone + more) * (heavier / weight) ** _WORTH
                    ):
                        return tokens
                size = self._sizes[number]
                if not (is_known and size.is_near(self.weight(start, fits) / fits)):
                    tried = min(fits, max(2 * tokens, 3 * least))
                    return tried if self._may_try(number) else tokens
                tokens, weight = fits, self.weight(start, fits)
                more = fixed + each * weight
                if fits < top and not is_eaten:
                    return tokens
            number += 1

    def _fit(self, start: int, seconds: float, each: float) -> int:
        return self.fit(start, max(seconds, 0.0) / each) // self.least * self.least

    def _size_of(self, tokens: int) -> _Size:
        return self._sizes[(tokens - 1).bit_length()]

    def _is_known(self, number: int) -> bool:
        size = self._sizes.get(number)
        return size is not None and self._num_prompts - size.seen < _AGE

    def _may_try(self, number: int) -> bool:
        size = self._sizes[number]
        if self._num_prompts - size.tried < _PATIENCE:
            return False
        size.tried = self._num_prompts
        return True

    def _line(self, number: int) -> tuple[float, float]:
        """Seconds that prompts take in steps of that size, whatever they weigh, and for each unit
        of weight: by what was seen of them, else of the next smaller ones, else of larger ones."""
        size, share = self._sizes[number], _SURE_FIXED
        if self._num_prompts - size.seen >= _AGE:
            known = [n for n, other in self._sizes.items() if other.steps]
            size = self._sizes[max((n for n in known if n < number), default=min(known))]
            if size.is_near(self._fixed_at):
                share = _MOST_FIXED
        fixed = min(self._fixed, share * size.seconds)
        return fixed, max((size.seconds - fixed) / size.weight, 1e-12)

    def observe(self, num_decodes: int, tokens: int, weight: float, seconds: float) -> None:
        """A step took `seconds`, with so many tokens of prompts, of that weight."""
        if not tokens:
            self._decodes[_rounded(num_decodes)].append(seconds)
            self._times.clear()
        elif alone := self._alone(num_decodes):
            self._num_prompts += 1
            size = self._size_of(num_decodes + tokens)
            if self._num_prompts - size.seen > _PAUSE:  # the context has changed
                size.steps = deque([*size.steps][-1:], _PROMPTS)
            size.seen, size.density = self._num_prompts, weight / tokens
            size.add(max(seconds - alone, 0.0), weight)
            if self._num_prompts % _PATIENCE == 0:
                self._fix(size.density)

    def _fix(self, density: float) -> None:
        """The line through the two lightest sizes that were seen at about this context begins with
        what prompts take whatever they weigh."""
        near = [
            (size.weight, size.seconds)
            for size in self._sizes.values()
            if self._num_prompts - size.seen < _FRESH and size.is_near(density)
        ]
        if len(near) > 1:
            (light, short), (heavy, long) = sorted(near)[:2]
            if light < heavy:
                each = (long - short) / (heavy - light)
                self._fixed, self._fixed_at = min(max(short - each * light, 0.0), short), density

    def _alone(self, num_decodes: int) -> float:
        """Seconds of a step of decodes, of the nearest size that was seen; 0 where none was."""
        if not self._decodes:
            return 0.0
        size = _rounded(num_decodes)
        if size not in self._times:
            nearest = min(self._decodes, key=lambda known: abs(known - size))
            self._times[size] = median_high(self._decodes[nearest])
        return self._times[size]


def _rounded(num_rows: int) -> int:
    """A number that grows by one with each quarter of a power of two."""
    bits = num_rows.bit_length()
    return num_rows if bits < 3 else 4 * bits - 8 + (num_rows >> bits - 3 & 3)
