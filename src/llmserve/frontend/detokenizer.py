# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Token ids to text as they come, and stop strings in that text.

All text of a request goes through here, streamed or not, so that joined deltas are the whole.
"""

import codecs
from typing import Protocol

from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.tokenizer import Tokenizer

_CONTEXT = 5  # tokens before the output that a decoder with context gets to see


class Detokenizer(Protocol):
    """One request's decoder. Only output tokens make text; the prompt never shows."""

    def feed(self, ids: list[int]) -> str:
        """The text that is certain after these tokens."""

    def flush(self) -> str:
        """The rest: U+FFFD for a character that was never completed."""


class TableDetokenizer:
    """By table lookup; a UTF-8 state exists only while a character is split over tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        pieces = tokenizer.visible_pieces if skip_special_tokens else tokenizer.pieces
        assert pieces is not None and tokenizer.piece_bytes is not None
        self._pieces = pieces
        self._bytes = tokenizer.piece_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._split = False

    def feed(self, ids: list[int]) -> str:
        pieces, size = self._pieces, len(self._pieces)
        if len(ids) == 1 and not self._split and ids[0] < size:
            piece = pieces[ids[0]]
            if piece is not None:
                return piece
        text = []
        for token in ids:
            if token >= size or token in self._skipped:  # logits may be wider than the vocabulary
                continue
            piece = pieces[token]
            if piece is not None and not self._split:
                text.append(piece)
            else:
                text.append(self._utf8.decode(self._bytes[token]))
                self._split = bool(self._utf8.getstate()[0])
        return "".join(text)

    def flush(self) -> str:
        self._split = False
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For decoders that look at neighbours: decodes a window with and without what is new."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: list[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = prompt_token_ids[-_CONTEXT:]
        if self._decode(self._window).endswith("\ufffd"):
            self._window = []  # half a character of the prompt would leak into the answer
        self._shown = len(self._window)

    def feed(self, ids: list[int]) -> str:
        self._window += ids
        before = self._decode(self._window[: self._shown])
        after = self._decode(self._window)
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip)


def make_detokenizer(
    tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: list[int]
) -> Detokenizer:
    """The fastest one that is right for this tokenizer."""
    if tokenizer.pieces is not None:
        return TableDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids)


class StopSearch:
    """Text as it grows, searched for stop strings and cut at the first.

    The first stop string is the one that is complete first when the text is read character by
    character (the longest, if several end there), so it does not depend on where pieces begin.
    `take` gives text once no stop string can begin in it any more.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.strings = params.stop
        self.reason: str | None = None
        self.text = ""  # what was not taken yet, and before it what a stop string may begin in
        self._longest = max(map(len, self.strings), default=1)
        self._include = params.include_stop_str_in_output
        self._held = 0 if self._include else self._longest - 1
        self._taken = 0

    def add(self, text: str, active: bool) -> bool:
        """More text; whether it completes a stop string. Not `active` text is not searched."""
        searched = len(self.text)
        self.text += text
        return active and bool(self.strings) and self._find(searched)

    def release(self) -> None:
        """Gives up on what may begin in the text so far."""
        self._held = 0

    def restart(self) -> None:
        """After all was taken: stop strings begin in later text only."""
        self.text, self._taken = "", 0
        self._held = 0 if self._include else self._longest - 1

    def take(self) -> str:
        """The text that is new since the last call."""
        end = len(self.text) - self._held
        if end <= self._taken:
            return ""
        text = self.text[self._taken : end]
        self._taken = end
        keep = self._longest - 1  # a stop string that ends in new text begins here at the earliest
        if end > keep:
            drop = min(end, len(self.text) - keep)
            self.text = self.text[drop:]
            self._taken -= drop
        return text

    def _find(self, searched: int) -> bool:
        """Looks for stop strings that end after position `searched`; cuts the text at the first."""
        best: tuple[int, int] | None = None  # (end, start)
        for stop in self.strings:
            start = self.text.find(stop, max(0, searched - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start)
                best = found if best is None else min(best, found)
        if best is None:
            return False
        end, start = best
        self.reason = self.text[start:end]
        self.text = self.text[: end if self._include else start]
        self._held = 0
        return True


class OutputText:
    """One continuation's text: detokenized, and cut at the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: list[int]
    ) -> None:
        self._detokenizer = make_detokenizer(
            tokenizer, params.skip_special_tokens, prompt_token_ids
        )
        self._search = StopSearch(params)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found."""
        return self._search.reason

    def feed(self, ids: list[int]) -> int:
        """Takes tokens in; how many of them count: fewer than all if a stop string is complete.

        `stop_reason` is then set and nothing more may be fed.
        """
        search = self._search
        if not search.strings:
            search.text += self._detokenizer.feed(ids)
            return len(ids)
        for count, token in enumerate(ids, 1):
            self._num_tokens += 1
            text = self._detokenizer.feed([token])
            if search.add(text, self._num_tokens > self._min_tokens):
                return count
        return len(ids)

    def finish(self) -> None:
        """After the last token: brings out what was held back."""
        self._search.add(self._detokenizer.flush(), self._num_tokens > self._min_tokens)
        self._search.release()

    def take(self) -> str:
        """The text that is new since the last call."""
        return self._search.take()
