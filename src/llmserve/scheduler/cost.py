# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How much of a prompt fits into a step without holding up those who decode."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

_TIMES = 2.5  # a step without prompts; some take longer than was foreseen and stay under 3
_GROWTH = 4  # from the largest recent prompt on, as small ones ride along for less than their share
_ANY = 1e12  # weight: no limit
_DECODES, _PROMPTS = 15, 9  # steps that are remembered


class StepCosts:
    """Learns what steps take from those that have run.

    A step of decodes has its own time for each power of two of rows. What prompts add is put down
    to their tokens; a token at position p weighs 1 + p * `context_cost`, which is what attention to
    one more token costs in units of all that does not depend on the context. Both are medians: a
    stall says nothing. `most` seconds may a step take, None is 2.5 times the one without prompts;
    but the first prompt gets on by `least` tokens, whatever they cost.
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
        self._prompts: deque[tuple[float, float]] = deque(maxlen=_PROMPTS)  # seconds a weight, it

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
        most = self._most or _TIMES * alone
        second = sorted(self._prompts)[len(self._prompts) // 2][0]
        room = max(most - alone, 0) / max(second, 1e-12)
        return min(room, _GROWTH * max(weight for _, weight in self._prompts))

    def observe(self, num_decodes: int, weight: float, seconds: float) -> None:
        """A step took `seconds`, with prompts of that weight."""
        if not weight:
            self._decodes[num_decodes.bit_length()].append(seconds)
        elif weight >= self.least:
            extra = max(seconds - self._alone(num_decodes), 0)
            self._prompts.append((extra / weight, weight))

    def _alone(self, num_decodes: int) -> float:
        """Seconds of a step of decodes, of the nearest size that was seen; 0 where none was."""
        if not self._decodes:
            return 0.0
        size = num_decodes.bit_length()
        nearest = min(self._decodes, key=lambda known: abs(known - size))
        times = sorted(self._decodes[nearest])
        return times[len(times) // 2]
