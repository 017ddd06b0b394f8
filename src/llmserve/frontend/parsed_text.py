# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Token ids to content, reasoning and tool calls as they come; stop strings in content alone."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from llmserve.core.outputs import Part
from llmserve.core.sampling_params import SamplingParams
from llmserve.frontend.detokenizer import StopSearch, make_detokenizer
from llmserve.frontend.tokenizer import Tokenizer
from llmserve.parsers.base import OutputParser
from llmserve.parsers.reader import join_parts


class Parsing(NamedTuple):
    """How a request's output is parsed. `shown` are special tokens that are text to the parser.

    One that only `counts` leaves the text as it is and counts the tokens of reasoning.
    """

    new_parser: Callable[[], OutputParser]
    shown: Mapping[int, str]
    counts: bool = False


def shown_tokens(tokenizer: Tokenizer, markers: frozenset[str]) -> dict[int, str]:
    """The special tokens among a parser's markers, with their texts."""
    names = {token: tokenizer.token_str(token) for token in tokenizer.special_ids}
    return {token: name for token, name in names.items() if name in markers}


class ParsedText:
    """One continuation's output, understood token by token, so that counts are exact.

    A stop string never spans what lies between two runs of content. After one was found,
    `stop_reason` is set and nothing more may be fed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_token_ids: list[int],
        parsing: Parsing,
    ) -> None:
        self._detokenizer = make_detokenizer(
            tokenizer, params.skip_special_tokens, prompt_token_ids
        )
        self._parser = parsing.new_parser()
        self._shown = parsing.shown
        self._search = StopSearch(params)
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._parts: list[Part] = []
        self.hidden: list[bool] = []  # of each token fed: whether it belongs to reasoning
        self.num_reasoning = 0  # without markers

    @property
    def stop_reason(self) -> str | None:
        """The stop string that was found."""
        return self._search.reason

    def feed(self, ids: list[int]) -> int:
        """Takes tokens in; how many of them count: fewer than all if a stop string is complete."""
        parser = self._parser
        for count, token in enumerate(ids, 1):
            self._num_tokens += 1
            before = parser.in_reasoning
            text = self._shown.get(token)
            if text is None:
                text = self._detokenizer.feed([token])
            stopped = bool(text) and self._add(parser.feed(text))
            after = parser.in_reasoning
            self.hidden.append(before or after)
            self.num_reasoning += before and after
            if stopped:
                return count
        return len(ids)

    def skip(self) -> None:
        """A token that is no text."""
        self.hidden.append(self._parser.in_reasoning)

    def finish(self, complete: bool) -> None:
        """After the last token; `complete` if the model ended by itself."""
        parts = self._parser.feed(self._detokenizer.flush())
        if not self._add(parts) and not self._add(self._parser.finish(complete)):
            self._search.release()
            self._move_content()

    def take(self) -> list[Part]:
        """What is new since the last call."""
        parts, self._parts = self._parts, []
        return join_parts(parts)

    def _add(self, parts: list[Part]) -> bool:
        """Whether the parts complete a stop string."""
        search = self._search
        for part in parts:
            if part.kind == "content" and search.strings:
                stopped = search.add(part.text, self._num_tokens > self._min_tokens)
                self._move_content()
                if stopped:
                    return True
                continue
            if search.text:
                search.release()
                self._move_content()
                search.restart()
            self._parts.append(part)
        return False

    def _move_content(self) -> None:
        if text := self._search.take():
            self._parts.append(Part("content", text))
