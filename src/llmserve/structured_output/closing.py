# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The way to the end of a JSON text, for answers that would otherwise be cut off by length.

Once the tokens that are left are about as many as the way out takes, only tokens that lead there
are allowed: a string or a bracket is closed wherever it may be, and nothing is opened that need
not be. How long the way is, is found out by walking it with a copy of the matcher.
"""

from collections.abc import Callable

import numpy as np

from llmserve.structured_output.base import Matcher
from llmserve.structured_output.vocabulary import Vocabulary

_FIRST, _LAST = 64, 256  # tokens that are left when the way is measured first: at least, at most
_KEEP = 4  # tokens more than what was measured, and an eighth of it: the model chooses others

OUT, IN, ESCAPED = range(3)  # of a string, and after a backslash in it


class Closing:
    """What is known of a vocabulary: which tokens lead out, best first. `end` are the words of the
    end tokens (see Matcher.fill)."""

    def __init__(self, vocabulary: Vocabulary, end: np.ndarray) -> None:
        self.tokens = vocabulary.tokens
        self._end = end
        tests: list[tuple[bool, Callable[[bytes], bool]]] = [
            (True, lambda token: token[:1] == b'"' and not token[1:].strip(b"}]")),
            (True, lambda token: token[:1] == b'"'),
            (False, lambda token: not token.strip(b"}]")),
            (False, lambda token: token[:1] in (b"}", b"]")),
            (False, lambda token: token == b","),
            (False, lambda token: token[:1] == b","),
            (False, lambda token: token[:1] == b'"' and not token.strip(b'"}],:')),
            (False, lambda token: token[:1] == b'"'),
            (False, lambda token: token[:1] not in (b"{", b"[", b" ", b"\n", b"\t", b"\r")),
        ]
        self._ways = [(inside, self._words(test)) for inside, test in tests]

    def _words(self, test: Callable[[bytes], bool]) -> np.ndarray:
        flags = np.zeros(len(self._end) * 32, np.bool_)
        flags[: len(self.tokens)] = [bool(token) and test(token) for token in self.tokens]
        return np.packbits(flags, bitorder="little").view(np.int32)

    def restrict(self, words: np.ndarray, place: int) -> bool:
        """Leaves in `words` the allowed tokens that lead out best; True if the text may end."""
        if (words & self._end).any():
            words &= self._end
            return True
        for inside, way in self._ways:
            if inside == (place != OUT) and (found := words & way).any():
                words[:] = found
                break
        return False

    def after(self, place: int, token: int) -> int:
        """Where the text is once `token` is written."""
        text = self.tokens[token] if token < len(self.tokens) else b""
        if place != ESCAPED and b'"' not in text and b"\\" not in text:
            return place
        for byte in text:
            if place == ESCAPED:
                place = IN
            elif byte == 0x22:
                place = IN if place == OUT else OUT
            elif byte == 0x5C and place == IN:
                place = ESCAPED
        return place

    def measure(self, matcher: Matcher, place: int, limit: int) -> int | None:
        """Tokens to the end, its own token among them; None if there are more than `limit`."""
        words = np.empty_like(self._end)
        for count in range(1, limit + 1):
            if matcher.ended():
                return count
            matcher.fill(words)
            if self.restrict(words, place):
                return count
            index = int(np.flatnonzero(words)[0])
            word = int(words[index]) & 0xFFFFFFFF
            token = index * 32 + (word & -word).bit_length() - 1
            if not matcher.accept(token):
                return None
            place = self.after(place, token)
        return None


class Way:
    """How near one request is to the end of its text and of its tokens."""

    def __init__(self, closing: Closing, total: int) -> None:
        self._closing = closing
        self._place = OUT
        self._check_at = min(total, max(_FIRST, min(total // 2, _LAST)))
        self._is_closing = False

    def took(self, token: int) -> None:
        """`token` was written."""
        self._place = self._closing.after(self._place, token)

    def narrow(self, matcher: Matcher, words: np.ndarray, left: int) -> None:
        """Restricts `words`, where it is time to; `left` are the tokens that may still come."""
        if not self._is_closing and left <= self._check_at:
            need = self._closing.measure(matcher.fork(), self._place, left)
            spare = left // 2 if need is None else left - need - need // 8 - _KEEP
            self._is_closing = need is not None and spare <= 0
            self._check_at = left - max(1, spare // 4)
        if self._is_closing:
            self._closing.restrict(words, self._place)
