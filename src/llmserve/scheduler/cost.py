# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of a prompt fits into a step without holding up those who decode."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median_high

_TIMES = 2.5  # a step without prompts; some take longer than was foreseen and stay under 3
_SHARE = 2 / 3  # of the time of all else in the step that prompts get at least: two fifths of it
_GROWTH = 4  # from what was tried on: small prompts ride along for less than their share
_ANY = 1e12  # weight: no limit
_DECODES, _PROMPTS = 15, 24  # steps that are remembered
_ENDS = 3  # of them, the lightest and the heaviest, of which a line is drawn
_LIGHT = 8  # of so many steps one is light, so that both ends are known
_APART = 1.5  # times the weight of the lightest that tells a line from a point
_KEEP = 4  # steps that a line is good for


class StepCosts:
    """Learns what steps take from those that have run.

    A step of decodes has its own time for each power of two of rows. Prompts add a time that does
    not depend on how long they are, and one for each of their tokens; a token at position p weighs
    1 + p * `context_cost`, which is what attention to one more token costs in units of all that
    does not depend on the context. All are medians: a stall says nothing. `most` seconds may a step
    take. None is 2.5 times the one without prompts, or more where prompts would hardly get on; and
    the first prompt gets on by `least` tokens, whatever they cost.
    """

    def __init__(
        self,
        most: float | None,
        context_cost: float,
        least: int = 64,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self.least = least
        self._most = most
        self._context_cost = context_cost
        self._decodes: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_DECODES))
        # steps with prompts: their weight, decodes beside them, seconds
        self._times: dict[int, float] = {}  # their medians, as far as they were asked for
        self._prompts: deque[tuple[float, int, float]] = deque(maxlen=_PROMPTS)
        self._line = (0.0, 0.0, 0.0, 0.0)
        self._num_new = 0  # prompts that the line does not know
        self._num_rooms = 0

    def weight(self, start: int, count: int) -> float:
        """Of the `count` tokens from position `start` on."""
        return count * (1 + self._context_cost * (start + count / 2))

    def fit(self, start: int, room: float) -> int:
        """How many tokens from position `start` on weigh at most `room`."""
        first = 1 + self._context_cost * start
        root = math.sqrt(first * first + 2 * self._context_cost * room)
        return int(2 * room / (first + root))

    def room(self, num_decodes: int) -> float:
        """The weight of prompts that a step beside `num_decodes` others may have."""
        alone = self._alone(num_decodes)
        if not alone or not self._prompts:
            return _ANY
        if self._num_new >= min(_KEEP, len(self._prompts)):
            self._line, self._num_new = self._draw(), 0
        light, heavy, fixed, second = self._line
        if self._most:
            seconds = self._most - alone - fixed
        else:
            seconds = max((_TIMES - 1) * alone - fixed, _SHARE * (alone + fixed))
        room = max(seconds, 0.0) / second
        self._num_rooms += 1
        if self._num_rooms % _LIGHT == 0:
            room /= _GROWTH
        elif not self._most and heavy <= min(_APART * light, 2 * self.least):
            room = max(room, 2 * heavy)  # of such steps it cannot be told what their tokens take
        return min(room, _GROWTH * heavy)

    def observe(self, num_decodes: int, weight: float, seconds: float) -> None:
        """A step took `seconds`, with prompts of that weight."""
        if weight:
            self._prompts.append((weight, num_decodes, seconds))
            self._num_new += 1
        else:
            self._decodes[num_decodes.bit_length()].append(seconds)
            self._times.clear()

    def _draw(self) -> tuple[float, float, float, float]:
        """Weights of light and heavy steps, seconds that prompts take whatever they weigh, and for
        each unit of weight."""
        steps = sorted(self._prompts, key=lambda step: step[0])
        ends = min(_ENDS, (len(steps) + 1) // 2)
        (light, short), (heavy, long) = self._middle(steps[:ends]), self._middle(steps[-ends:])
        fixed = 0.0
        if heavy > _APART * light:
            fixed = max(short - (long - short) / (heavy - light) * light, 0.0)
        return light, heavy, fixed, max((long - fixed) / heavy, 1e-12)

    def _middle(self, steps: list[tuple[float, int, float]]) -> tuple[float, float]:
        more = [max(seconds - self._alone(n), 0.0) for _, n, seconds in steps]
        return median_high([weight for weight, *_ in steps]), median_high(more)

    def _alone(self, num_decodes: int) -> float:
        """Seconds of a step of decodes, of the nearest size that was seen; 0 where none was."""
        if not self._decodes:
            return 0.0
        size = num_decodes.bit_length()
        if size not in self._times:
            nearest = min(self._decodes, key=lambda known: abs(known - size))
            self._times[size] = median_high(self._decodes[nearest])
        return self._times[size]
