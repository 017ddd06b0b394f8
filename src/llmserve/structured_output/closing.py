# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The way to the end of a JSON text, or of calls in tags, for answers that would otherwise be cut
off by length.

The way is found by walking it with a copy of the matcher, which costs some 30 us a token; so it is
walked seldom while many tokens are left. Near the end nothing is begun any more (another call,
property or item, or the longer of two values) whose own way to the end is longer than what is left,
and at last the way is followed.
"""

import re

import numpy as np

from llmserve.structured_output.base import Matcher
from llmserve.structured_output.vocabulary import Beginnings, Vocabulary, is_plain, words_where

_FIRST = 1024  # tokens that are left when the way is walked first, at most
_BEGUN = 64  # tokens that a single one may begin, where a whole text does not take more
_LONGEST = 256  # tokens up to which the way from the start is measured
_SPARE = 3  # a character that was begun may need as many more
_SURE = 6  # of the ways outside text: what closes, and commas, which stand where nothing closes
_MAX_ZEROS = 12  # in a row, that may make a multiple of 1000 or of 1024; another digit one of 15
_TRIES = 3  # times that what is left is walked at most
_MAX_BRANCHES = 32  # that are measured one by one
_MAX_LETTERS = 4096  # tokens: where there are more, a name is written
_MAX_GRAMMARS = 1024  # whose ways from the start are remembered
_DIGITS = re.compile(rb"[-.0-9]*\Z")
_SPACE, _NUMBER = re.compile(rb"[ \t\r\n]+"), re.compile(rb"[-+0-9.eE]+")
# Up to what begins something; of a tag all, since one may begin something or end it
_BRANCH = re.compile(rb'<.*|"?[}\])"]*[^}\])"]?', re.DOTALL)
_ENDS = [  # of the raw text that an argument may be, which holds quotes and newlines as they are
    text.encode()
    for text in (
        "</parameter>", "</arg_value>", "</steptml:parameter>", "<|close|>argument<|sep|>",
        "</｜DSML｜parameter>", "</｜DSML｜ parameter>", "]<]minimax[>[", '<|"|>', "<escape>",
        "]<]minimax[>[</invoke>",  # where no schema gives names to elements
    )
]  # fmt: skip
# Of all calls, where another one may begin with the same letters
_LAST = [text.encode() for text in ("<|tool_calls_section_end|>", "<｜tool▁calls▁end｜>")]
_LONGEST_END = max(map(len, _ENDS + _LAST))


class Closing:
    """What is known of a vocabulary: which tokens lead out, best first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens.copy()
        for token, text in vocabulary.special.items():
            self.tokens[token] = text
        ends = np.zeros(len(self.tokens), np.bool_)
        ends[vocabulary.eos_token_ids] = True
        self.end = end = words_where(ends)
        self._end_at = [(i, int(end[i])) for i in np.flatnonzero(end).tolist()]
        self._lengths = np.zeros(len(end) * 32, np.int32)
        self._lengths[: len(self.tokens)] = [*map(len, self.tokens)]
        self._free = int(np.count_nonzero(self._lengths)) // 4
        self._starts: dict[object, int | None] = {}
        self._branches: dict[tuple[int, bool], bytes] = {}
        begin = Beginnings(self.tokens)
        spaces = begin.of(b" \n\t\r")
        in_text = [begin.of(b'"', rb'"[}\])]*'), begin.of(b'"')]
        outside = [
            begin.of(b"}])", rb"[}\])]*"),
            begin.of(b"}])"),
            begin.of(b"/>=:", rb"[/>=:]*"),  # of tags
            begin.of(b"/>=:") | begin.of(b"<", rb"(?s)</.*"),
            begin.of(b",", b","),
            begin.of(b","),
            begin.of(b'"', rb'["}\]):]*'),
            begin.of(b'"'),
            begin.any() & ~spaces & ~begin.of(b"{["),
            begin.any() & ~spaces,
            begin.any(),
        ]
        self._ways = {True: np.stack(in_text), False: np.stack(outside)}
        self._quotes = words_where([b'"' in token for token in self.tokens])
        self._newline = begin.of(b"\n", b"\n")
        self._zeros = begin.of(b"0", b"0+")
        pieces = {e[i:j] for e in _ENDS for i in range(len(e)) for j in range(i + 1, len(e) + 1)}
        self._pieces = {text: i for i, text in enumerate(self.tokens) if text in pieces}

    def is_free(self, words: np.ndarray) -> bool:
        """Whether `words` are those of a place where nearly any text may stand, as in a string."""
        return int(np.bitwise_count(words.view(np.uint32)).sum()) > self._free

    def is_raw(self, words: np.ndarray) -> bool:
        """Whether `words` are those of within the raw text that an argument may be."""
        return self.is_free(words) and bool((words & self._newline).any())

    def may_end(self, words: np.ndarray) -> bool:
        """Whether the text may end here."""
        return any([words.item(i) & bits for i, bits in self._end_at])

    def _outward(self, words: np.ndarray, is_free: bool) -> list[int]:
        """The allowed tokens that lead out best, the longest first, one for each text begun;
        in free text that may not be closed any one. None at a dead end."""
        found = self._ways[is_free] & words
        leads = found.any(axis=1)
        first = int(leads.argmax())
        tokens = _tokens(found[first] if leads[first] else words)
        if not len(tokens):
            return []
        if is_free or first < _SURE or len(tokens) > _MAX_BRANCHES:
            return [int(tokens[self._lengths[tokens].argmax()])]
        found_texts: list[bytes] = []
        options: list[int] = []
        for token in tokens[np.argsort(-self._lengths[tokens], kind="stable")].tolist():
            text = _NUMBER.sub(b"0", self.tokens[token])
            if not any(longer.startswith(text) for longer in found_texts):
                found_texts.append(text)
                options.append(token)
        return options

    def _branch(self, token: int, is_free: bool = False) -> bytes:
        """What the token does: its text as far as something is begun. Spaces say nothing, and one
        number is like another. Of free text only the end counts."""
        found = self._branches.get((token, is_free))
        if found is None:
            text = self.tokens[token]
            if is_free:
                text = text[text.index(b'"') :]
            match = _BRANCH.match(_NUMBER.sub(b"0", _SPACE.sub(b"", text)))
            found = self._branches[token, is_free] = match[0] if match else text
        return found

    def _out_of_raw(
        self, matcher: Matcher, words: np.ndarray, written: bytes
    ) -> tuple[Matcher, list[int]] | None:
        """Tokens of `words` that end the raw text, of whose end some may stand at the end of
        `written`, or go on where it is too short; and a matcher behind them."""
        after, is_short = np.empty_like(words), False
        for end in _ENDS:
            begun = (n for n in range(len(end) - 1, 0, -1) if written.endswith(end[:n]))
            fork, path = matcher.fork(), list[int]()
            rest = end[next(begun, 0) :]
            while rest:
                pieces = (self._pieces.get(rest[:n]) for n in range(len(rest), 0, -1))
                token = next((t for t in pieces if t is not None and fork.accept(t)), None)
                if token is None:
                    break
                path.append(token)
                rest = rest[len(self.tokens[token]) :]
            is_short = is_short or bool(rest)
            if not rest and not fork.ended():
                fork.fill(after)
                if not self.is_raw(after):
                    return fork, path
        longest = _tokens(words)
        more = [int(longest[self._lengths[longest].argmax()])]
        return (fork, more) if is_short and (fork := matcher.fork()).accept(more[0]) else None

    def walk(self, matcher: Matcher, limit: int, written: bytes = b"") -> list[int] | None:
        """Tokens that lead to where the text may end; None if there are as many as `limit`, or no
        way was found: of two texts that may come next, the other is tried where one leads too far.
        `written` is what the text ends with.
        """
        words, path, quoted, tail = np.empty_like(self.end), list[int](), False, b""
        others: list[tuple[Matcher, list[int], int]] = []
        for _ in range(_TRIES * limit):
            if matcher.ended():
                return path
            matcher.fill(words)
            if self.may_end(words):
                return path
            is_free = self.is_free(words)
            if is_free and self.is_raw(words):
                out = self._out_of_raw(matcher, words, b"" if path else written)
                if out is not None and len(path) + len(out[1]) < limit:
                    matcher = out[0]
                    path += out[1]
                    continue
            if _has_zeros(tail) and (words & ~self._zeros).any():
                words &= ~self._zeros
            options = self._outward(words, is_free)
            # Where one quote does not end free text, another will not
            if len(path) + 1 >= limit or (is_free and quoted) or not options:
                if not others:
                    return None
                matcher, options, length = others.pop()
                del path[length:]
                is_free = False
            if len(options) > 1:
                options.sort(key=lambda token: not _leads_to_last(tail, self.tokens[token]))
                others.append((matcher.fork(), options[1:], len(path)))
            if not matcher.accept(options[0]):
                return None
            text = self.tokens[options[0]]
            quoted = is_free and text[:1] == b'"'
            path.append(options[0])
            tail = (tail + text)[-_LONGEST_END:]
        return None

    def from_start(self, name: object, start: Matcher) -> int | None:
        """Tokens of the shortest text of the grammar `name`, its end among them; None if many."""
        if name not in self._starts:
            if len(self._starts) >= _MAX_GRAMMARS:
                self._starts.clear()
            path = self.walk(start.fork(), _LONGEST)
            self._starts[name] = None if path is None else len(path) + 1
        return self._starts[name]

    def branches(self, words: np.ndarray, is_free: bool) -> tuple[dict[bytes, list[int]], bool]:
        """Where one of several things may be begun: the allowed tokens by what they begin, of free
        text those that end it and go on; and whether others are allowed that begin nothing. No
        token ends a raw text, or a name, and begins something."""
        tokens = _tokens(words & (self._quotes if is_free else ~self.end))
        if self.is_raw(words) if is_free else len(tokens) > _MAX_LETTERS:
            return {}, True
        found: dict[bytes, list[int]] = {}
        for token in tokens.tolist():
            found.setdefault(self._branch(token, is_free), []).append(token)
        may_end = self.may_end(words)
        if not may_end:
            found.pop(b"", None)  # spaces
        marks = b'}])"' if is_free else b"}])"
        closers = [text for text in found if text and not text.strip(marks)]
        others = is_free or may_end or bool(closers)
        if others:
            for text in (*closers, b"0"):  # a number that goes on
                found.pop(text, None)
        return (found if others or len(found) > 1 else {}), others


class Way:
    """How near one request is to the end of its text, and of the `total` tokens that it may have.
    `start` is at the beginning of the text of grammar `name`."""

    def __init__(self, closing: Closing, name: object, start: Matcher, total: int) -> None:
        self._closing = closing
        self._check_at = min(total, _FIRST)
        self._begun = _BEGUN
        self._need: int | None = None  # tokens to the end from here, or a few less
        self._path: list[int] | None = None  # those tokens
        self._after: dict[int, int] = {}  # the same after the tokens of this step
        self._costs: dict[bytes, int | None] = {}  # of branches, while in one free text
        self._is_free = False
        self._is_endless = False  # it is in raw text that no way leads out of, as reasoning
        self._written = b""  # the end of it
        if total <= _FIRST:
            self._need = closing.from_start(name, start)
            self._begun = max(_BEGUN, self._need or 0)
            if self._need is not None and self._need > total:
                self._check_at = -1

    def took(self, token: int) -> None:
        """`token` was written."""
        text = self._closing.tokens[token]
        self._written = (self._written + text)[-_LONGEST_END:]
        ends_text = b'"' in text or b"\\" in text
        if ends_text:
            self._costs.clear()
        if token in self._after:
            self._need, self._path = self._after[token], None
        elif self._path and self._path[0] == token:
            assert self._need is not None
            del self._path[0]
            self._need -= 1
        elif not (self._is_free and self._closes_text() and is_plain(text)):
            self._path = None

    def _closes_text(self) -> bool:
        return bool(self._path and b'"' in self._closing.tokens[self._path[0]])

    def narrow(self, matcher: Matcher, words: np.ndarray, left: int) -> None:
        """Restricts `words`, where it is time to; `left` are the tokens that may still come."""
        closing, self._after = self._closing, {}
        if left > self._check_at:
            return
        is_free = self._is_free = closing.is_free(words)
        if is_free and closing.may_end(words):
            return  # text that is no JSON may be cut anywhere
        if self._is_endless and closing.is_raw(words):
            return
        if self._path is None and (self._need is None or self._need + _SPARE >= left):
            limit = min(left, _LONGEST)
            path = self._path = closing.walk(matcher.fork(), limit)
            if (path is None or len(path) + 1 + _SPARE >= left) and closing.is_raw(words):
                # It may have begun to end, which counts if it goes on
                self._path = closing.walk(matcher.fork(), limit, self._written)
            self._is_endless = self._path is None and closing.is_raw(words)
            if self._path is None:
                self._check_at = left if self._is_endless else left // 2
                return
            self._need = len(path or self._path) + 1
        assert self._need is not None
        spare = left - self._need - _SPARE
        if spare > self._begun:
            self._check_at = left - (spare - self._begun + 1) // 2
            self._need = self._path = None
        elif spare > 0:
            self._begin_nothing_late(matcher, words, left)
        elif not self._path:
            words &= closing.end
        else:
            words[:] = 0
            _add(words, self._path[0])

    def _begin_nothing_late(self, matcher: Matcher, words: np.ndarray, left: int) -> None:
        closing = self._closing
        branches, others = closing.branches(words, self._is_free)
        if len(branches) > _MAX_BRANCHES:
            self._need = self._path = None
            return
        known, late = self._costs if self._is_free else {}, np.zeros_like(words)
        for text, tokens in branches.items():
            if text not in known:
                fork = matcher.fork()
                path = closing.walk(fork, _LONGEST) if fork.accept(tokens[0]) else None
                known[text] = None if path is None else len(path) + 1
            cost = known[text]
            if cost is not None and cost + _SPARE < left:
                others = True
                self._after |= dict.fromkeys(tokens, cost)
            else:
                for token in tokens:
                    _add(late, token)
        if others:
            words &= ~late


def _has_zeros(text: bytes) -> bool:
    """Whether more zeros will hardly end the number that `text` ends with."""
    found = _DIGITS.search(text)
    assert found is not None
    significant = found[0].rstrip(b"0")
    most = _MAX_ZEROS if significant.strip(b"-.0") else 0  # one above 0 may be needed
    return len(found[0]) - len(significant) > most


def _leads_to_last(text: bytes, more: bytes) -> bool:
    """Whether `more` begins a text of _LAST, or goes on with what of it `text` ends with."""
    return any(
        text.endswith(end[:n]) and (end.startswith(more, n) or more.startswith(end[n:]))
        for end in _LAST
        for n in range(len(end))
    )


def _add(words: np.ndarray, token: int) -> None:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


def _tokens(words: np.ndarray) -> np.ndarray:
    """Those whose bits are set."""
    some = np.flatnonzero(words)
    bits = np.unpackbits(words[some].view(np.uint8), bitorder="little")
    found = np.flatnonzero(bits)
    return some[found // 32] * 32 + found % 32
