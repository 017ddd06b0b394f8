# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The way to the end of a JSON text, for answers that would otherwise be cut off by length.

How long the way is, is found out by walking it with a copy of the matcher. Near the end nothing is
begun any more (another call, property or item, or the longer of two values) whose own way to the
end is longer than what is left, and at last only tokens that lead out are allowed.
"""

import re
from collections.abc import Callable

import numpy as np

from llmserve.structured_output.base import Matcher
from llmserve.structured_output.vocabulary import Vocabulary

_FIRST = 1024  # tokens that are left when the way is measured first, at most
_KEEP = 4  # tokens more than what was measured, and an eighth of it: the model chooses others
_BEGUN = 64  # tokens that a single one may begin, where the way was never longer
_TRIES = 3  # times that what is left is walked at most
_MAX_CLASSES = 32  # of tokens that are measured one by one
_SPACE, _DIGITS = re.compile(rb"[ \t\r\n]+"), re.compile(rb"[0-9]+")


class Closing:
    """What is known of a vocabulary: which tokens lead out, best first. `end` are the words of the
    end tokens (see Matcher.fill)."""

    def __init__(self, vocabulary: Vocabulary, end: np.ndarray) -> None:
        self.tokens = vocabulary.tokens.copy()
        for token, text in vocabulary.special.items():
            self.tokens[token] = text
        self._end = end
        self._lengths = np.zeros(len(end) * 32, np.int32)
        self._lengths[: len(self.tokens)] = [*map(len, self.tokens)]
        self._free = int(np.count_nonzero(self._lengths)) // 4
        closers = b"}]"
        in_text: list[Callable[[bytes], bool]] = [
            lambda token: token[:1] == b'"' and not token[1:].strip(closers),
            lambda token: token[:1] == b'"',
        ]
        outside: list[Callable[[bytes], bool]] = [
            lambda token: not token.strip(closers),
            lambda token: token[:1] in (b"}", b"]"),
            lambda token: token == b",",
            lambda token: token[:1] == b",",
            lambda token: token[:1] == b'"' and not token.strip(b'"}]:'),
            lambda token: token[:1] == b'"',
            lambda token: token[:1] not in (b"{", b"[", b" ", b"\n", b"\t", b"\r"),
            lambda token: token[:1] not in (b" ", b"\n", b"\t", b"\r"),
        ]
        self._ways = {True: [*map(self._words, in_text)], False: [*map(self._words, outside)]}
        self._quotes = self._words(lambda token: b'"' in token)

    def _words(self, test: Callable[[bytes], bool]) -> np.ndarray:
        flags = np.zeros(len(self._end) * 32, np.bool_)
        flags[: len(self.tokens)] = [bool(token) and test(token) for token in self.tokens]
        return np.packbits(flags, bitorder="little").view(np.int32)

    def is_free(self, words: np.ndarray) -> bool:
        """Whether `words` are those of a place where nearly any text may stand, as in a string."""
        return int(np.bitwise_count(words.view(np.uint32)).sum()) > self._free

    def may_end(self, words: np.ndarray) -> bool:
        """Whether the text may end here."""
        return bool(np.any(words & self._end))

    def restrict(self, words: np.ndarray) -> None:
        """Leaves in `words` the allowed tokens that lead out best."""
        if self.may_end(words):
            words &= self._end
            return
        for way in self._ways[self.is_free(words)]:
            if (found := words & way).any():
                words[:] = found
                return

    def measure(self, matcher: Matcher, limit: int) -> int | None:
        """Tokens to the end, its own token among them; None if there are more than `limit`, or no
        way was found: of two texts that may come next, the other is tried where one leads too far.
        """
        words, quoted, count = np.empty_like(self._end), False, 1
        others: list[tuple[Matcher, list[int], int]] = []
        for _ in range(_TRIES * limit):
            if matcher.ended():
                return count
            matcher.fill(words)
            if self.may_end(words):
                return count
            is_free = self.is_free(words)
            self.restrict(words)
            tokens = _tokens(words)
            options = [int(tokens[self._lengths[tokens].argmax()])] if len(tokens) else []
            if not is_free and 1 < len(tokens) <= _MAX_CLASSES:
                firsts = {self._first(token): token for token in tokens.tolist()}
                firsts.pop(self._first(options[0]))
                options += firsts.values()
            # Where one quote does not end free text, another will not
            if count == limit or (is_free and quoted) or not options:
                if not others:
                    return None
                matcher, options, count = others.pop()
                is_free = False
            if len(options) > 1:
                others.append((matcher.fork(), options[1:], count))
            if not matcher.accept(options[0]):
                return None
            quoted = is_free and self.tokens[options[0]][:1] == b'"'
            count += 1
        return None

    def _first(self, token: int) -> bytes:
        """What tells the token from others of another text; digits and spaces do not."""
        return _DIGITS.sub(b"0", _SPACE.sub(b"", self.tokens[token]))[:1]

    def longest_of_same(self, words: np.ndarray) -> int | None:
        """The longest allowed token, where all begin the same text, which has to be written."""
        tokens = _tokens(words)
        if len(tokens) > _MAX_CLASSES or self.may_end(words):
            return None
        found = max(tokens.tolist(), key=self._lengths.__getitem__)
        text = self.tokens[found]
        return found if all(text.startswith(self.tokens[token]) for token in tokens) else None

    def classes(self, words: np.ndarray) -> dict[bytes, list[int]]:
        """The allowed tokens that may begin something, by what they do; none where they are too
        many. Of free text those that end it."""
        free = self.is_free(words)
        may_begin = words & (self._quotes if free else ~self._end)
        found: dict[bytes, list[int]] = {}
        for token in _tokens(may_begin).tolist():
            text = self.tokens[token]
            if free:
                text = text[text.index(b'"') :]
            found.setdefault(_DIGITS.sub(b"0", _SPACE.sub(b"", text)), []).append(token)
        return found if len(found) <= _MAX_CLASSES else {}


class Way:
    """How near one request is to the end of its text and of its tokens."""

    def __init__(self, closing: Closing) -> None:
        self._closing = closing
        self._check_at = _FIRST
        self._begun = _BEGUN
        self._costs: dict[bytes, int | None] | None = None  # of classes, while in one free text
        self._need: int | None = None

    def took(self, token: int) -> None:
        """`token` was written."""
        if b'"' in self._closing.tokens[token]:
            self._costs = None

    def narrow(self, matcher: Matcher, words: np.ndarray, left: int) -> None:
        """Restricts `words`, where it is time to; `left` are the tokens that may still come."""
        closing = self._closing
        if left > self._check_at:
            return
        free = closing.is_free(words)
        if free and closing.may_end(words):
            return  # text that is no JSON may be cut anywhere
        if not free and (forced := closing.longest_of_same(words)) is not None:
            words[:] = 0
            _add(words, forced)
            return
        if not free or self._costs is None:
            self._costs = {} if free else None
            self._need = closing.measure(matcher.fork(), left)
        if self._need is None:
            self._check_at = left // 2
            return
        self._begun = max(self._begun, self._need)
        spare = left - _margin(self._need)
        if spare > self._begun:
            self._check_at = left - max(1, (spare - self._begun) // 4)
            return
        if spare <= 0:
            closing.restrict(words)
        known = {} if self._costs is None else self._costs
        limit, late = left - 1, np.zeros_like(words)
        for text, tokens in closing.classes(words).items():
            if text not in known:
                fork = matcher.fork()
                known[text] = closing.measure(fork, limit) if fork.accept(tokens[0]) else None
            cost = known[text]
            if cost is None or (_margin(cost) if spare > 0 else cost) > limit:
                for token in tokens:
                    _add(late, token)
        if (words & ~late).any():
            words &= ~late


def _margin(need: int) -> int:
    return need + need // 8 + _KEEP


def _add(words: np.ndarray, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _tokens(words: np.ndarray) -> np.ndarray:
    """Those whose bits are set."""
    some = np.flatnonzero(words)
    bits = np.unpackbits(words[some].view(np.uint8), bitorder="little")
    found = np.flatnonzero(bits)
    return some[found // 32] * 32 + found % 32
