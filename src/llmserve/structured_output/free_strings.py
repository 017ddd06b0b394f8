# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Strings of a JSON schema that may hold anything: within one the mask stays as it is.

A model that writes JSON is within strings most of the time, and there a mask of xgrammar takes 20
to 30 us over 152k tokens, for all the tokens that may end the string. To copy it takes one.
"""

import numpy as np

from llmserve.structured_output.vocabulary import Vocabulary, is_plain, words_where

_LETTERS = {bytes([i]) for i in range(32, 127)} - {b'"', b"\\"}


class FreeStrings:
    """By its mask it is told that a text is within one: it allows every printable letter."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokens = vocabulary.tokens
        letters = words_where([text in _LETTERS for text in vocabulary.tokens])
        self._places = np.flatnonzero(letters)
        self._letters = letters[self._places]
        self._are_known = _LETTERS.issubset(vocabulary.tokens)

    def holds(self, words: np.ndarray) -> bool:
        """Whether a mask, int32 [num_words], is of within a string, between two characters."""
        letters = self._letters
        return self._are_known and bool(((words[self._places] & letters) == letters).all())

    def stays(self, token: int) -> bool:
        """Whether the text still is there after `token`."""
        return is_plain(self._tokens[token])
