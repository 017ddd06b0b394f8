# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of a prompt fits into a step without holding up those who decode."""

import itertools
import math
from collections import defaultdict, deque
from statistics import median_high

import msgspec

_TIMES = 2.4  # a step without prompts; some take longer than was foreseen and stay under 3
_WORTH = 0.2  # or than one with the fewest tokens by this power of how much heavier it is
_DECODES, _PROMPTS = 15, 5  # steps of a size that are remembered
_PATIENCE = 4  # steps until a size is tried again: what it took is not known before
_AGE = 256  # steps after which a size is tried again
_NEAR = 3  # levels of context above the one in question


class Room(msgspec.Struct):
    """What prompts may have of a step: so many tokens, and of that weight at most."""

    tokens: int
    weight: float


_ANY = Room(1 << 40, 1e12)


class _Size:
    """What is known of steps with about so many tokens, some of them of prompts."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, float]] = deque(maxlen=_PROMPTS)  # seconds, weight
        self.longer = 0.0  # seconds that the middle one took more than one without prompts
        self.rate = 0.0  # seconds for a unit of weight, in the middle one
        self.seen = 0  # number of the last


class StepCosts:
    """Learns what steps take from those that have run.

    A step of decodes has its own time for each number of rows, to a quarter; where it is not known,
    a step goes without prompts. What prompts add grows with their weight: a token at position p
    weighs 1 + p * `context_cost`, which is what attention to one more token costs in units of all
    that does not depend on the context. Steps of about as many tokens are seen for themselves, by
    levels of context: larger ones may be run in another way and take several times as long, and
    what does not depend on the tokens is a smaller part of them. A size that is not known is tried
    where the next smaller one is short enough. All are medians: a stall says nothing.

    `most` seconds may a step take; None is 2.4 times the one without prompts. Where next to nothing
    fits into that, because much of a step with prompts does not depend on their tokens, they would
    hardly get on, and a step may take longer if that gains much. The first prompt gets on by
    `least` tokens or a few more, whatever they cost: kernels work on tiles of so many.
    """

    def __init__(self, most: float | None, context_cost: float, least: int = 64) -> None:
        self.least = least
        self._most = most
        self._context_cost = context_cost
        self._decodes: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_DECODES))
        self._times: dict[int, float] = {}  # their medians, as far as they were asked for
        self._waited: dict[int, int] = {}  # number of the step without prompts, for their sake
        # By number and level
        self._sizes: defaultdict[tuple[int, int], _Size] = defaultdict(_Size)
        self._tried: dict[int, int] = {}  # number of the step, by that of the size
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
        return Room(tokens, self.weight(start, tokens) * (1 + 1e-9))

    def _tokens(self, num_decodes: int, start: int, alone: float) -> int:
        """Goes up from size to size, as long as they are short enough."""
        limit, first = max(self._most or _TIMES * alone, alone), _size_of(num_decodes + self.least)
        tokens = least = _most_of(first) - num_decodes
        light = self.weight(start, least)
        level = _level(light / least)
        for number in itertools.count(first):
            top = _most_of(number) - num_decodes
            size = self._nearest(number, level)
            if size is None:
                return top if self._may_try(number) else tokens
            heavy = self.weight(start, top)
            seconds = alone + size.rate * heavy
            if seconds > limit and number > first:
                if (
                    self._known(number, level) is None
                    and alone + size.longer <= limit  # it was, at less context
                    and self._may_try(number)
                ):
                    return top
                if self._most:
                    break
                fewest = self._known(first, level)
                if fewest is None:
                    return least
                if seconds > (alone + fewest.rate * light) * (heavy / light) ** _WORTH:
                    break
            tokens = top
        return tokens

    def _known(self, number: int, level: int) -> _Size | None:
        """If it was seen lately at about this context."""
        size = self._sizes.get((number, level))
        return None if size is None or self._num_prompts - size.seen >= _AGE else size

    def _nearest(self, number: int, level: int) -> _Size | None:
        """As it was seen lately at about this context or at less of it, where it takes no longer
        than here."""
        for distance in range(max(level + 1, _NEAR)):
            for near in (level - distance, level + distance)[: 1 + (distance < _NEAR)]:
                if (size := self._known(number, near)) is not None:
                    return size
        return None

    def _may_try(self, number: int) -> bool:
        if self._num_prompts - self._tried.get(number, -_PATIENCE) < _PATIENCE:
            return False
        self._tried[number] = self._num_prompts
        return True

    def observe(self, num_decodes: int, tokens: int, weight: float, seconds: float) -> None:
        """A step took `seconds`, with so many tokens of prompts, of that weight."""
        if not tokens:
            self._decodes[_rounded(num_decodes)].append(seconds)
            self._times.clear()
        elif alone := self._alone(num_decodes):
            self._num_prompts += 1
            size = self._sizes[_size_of(num_decodes + tokens), _level(weight / tokens)]
            size.seen = self._num_prompts
            size.steps.append((max(seconds - alone, 1e-9), weight))
            size.longer, heavy = median_high(size.steps)
            size.rate = size.longer / heavy

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


def _size_of(tokens: int) -> int:
    """The first of 2, 3, 4, 6, 8, 12, ... that is as large, by number: graphs are captured for
    about such numbers of tokens, and steps padded to them."""
    bits = max(tokens - 1, 1).bit_length() - 1
    return 2 * bits - (tokens > 1 and 2 * tokens <= 3 << bits)


def _most_of(size: int) -> int:
    """Tokens."""
    return (2 + size % 2) << size // 2


def _level(density: float) -> int:
    """Of the weight of a token, in half powers of two."""
    return int(2 * math.log2(density))
