# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Where one output stands in its reasoning, and what must come next once its budget is spent."""

from llmserve.core.sampling_params import ReasoningBudget


class Thought:
    """Reads an output token by token. `forced` is the only token that may come next, or None.

    What counts is what a reasoning parser calls reasoning, whose texts the budget has.
    """

    def __init__(self, budget: ReasoningBudget) -> None:
        self._budget = budget
        self._left = budget.tokens
        self._state = "inside" if budget.inside else "before"  # or "over"
        self._tail = b""  # what may be the beginning of a marker
        self._longest = max(map(len, (*budget.opens, *budget.closes)))
        self._num_endings = 0
        self._ending: list[int] = []  # what is still to be forced, backwards
        self._force_if_spent()

    @property
    def forced(self) -> int | None:
        """The token that must come next; None where any may."""
        return self._ending[-1] if self._ending else None

    def may_be_spent(self, num_unseen: int) -> bool:
        """Whether something may be forced after `num_unseen` tokens that are not known yet."""
        return bool(self._ending) or (self._state != "over" and self._left <= num_unseen)

    def feed(self, token: int) -> None:
        """Takes the token that was drawn."""
        if self._ending:
            self._ending.pop()
            if not self._ending:
                self._close()
            return
        piece = self._budget.pieces.get(token)
        if self._state == "inside":
            self._think(piece)
        elif self._state == "before":
            self._look_for_opener(piece)

    def _think(self, piece: bytes | None) -> None:
        self._tail = b"" if piece is None else self._tail + piece
        if any(closer in self._tail for closer in self._budget.closes):
            self._close()
            return
        self._tail = self._tail[-self._longest :]
        self._left -= 1
        self._force_if_spent()

    def _look_for_opener(self, piece: bytes | None) -> None:
        budget = self._budget
        if budget.reopens:
            self._tail = b"" if piece is None else (self._tail + piece)[-2 * self._longest :]
            if any(opener in self._tail for opener in budget.opens):
                self._open()
        elif piece is None:
            self._state = "over"
        else:
            self._tail = (self._tail + piece).lstrip()
            if self._tail.startswith(tuple(budget.opens)):
                self._open()
            elif not any(opener.startswith(self._tail) for opener in budget.opens):
                self._state = "over"

    def _open(self) -> None:
        self._state, self._tail = "inside", b""
        self._force_if_spent()

    def _close(self) -> None:
        self._state, self._tail = "before" if self._budget.reopens else "over", b""

    def _force_if_spent(self) -> None:
        if self._state == "inside" and self._left <= 0:
            endings = self._budget.endings
            self._ending = endings[min(self._num_endings, len(endings) - 1)][::-1]
            self._num_endings += 1
