# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log-probabilities in the shapes of chat, of completions, and of prompts."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmserve.core.outputs import Logprob
from llmserve.frontend.tokenizer import Tokenizer

T = TypeVar("T")
LEAST_LOGPROB = -9999.0  # JSON has no -Infinity
_INLINE = 512  # take some 1 ms; a thread costs 0.1 ms

Entry = tuple[list[int], list[float], int]  # Delta.logprobs: column 0 is the token itself
PromptEntry = dict[int, Logprob] | None


async def write(num_logprobs: int, writer: Callable[..., T], *arguments: Any) -> T:
    """`writer(*arguments)`, in a thread where it takes long: others stream meanwhile."""
    if num_logprobs < _INLINE:
        return writer(*arguments)
    return await asyncio.to_thread(writer, *arguments)


class TokenNames:
    """How tokens are written: as text, or as `token_id:7` if asked for or without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def name(self, token: int) -> str:
        """The token's text by itself."""
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.token_str(token)

    def bytes(self, token: int) -> list[int]:
        """The bytes of its name."""
        if self._tokenizer is None:
            return list(self.name(token).encode())
        return list(self._tokenizer.token_bytes(token))

    def chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The `logprobs` of a chat choice; alternatives are the columns after the first."""
        content = []
        for ids, values, _ in entries:
            pairs = [
                {
                    "token": self.name(token),
                    "logprob": max(value, LEAST_LOGPROB),
                    "bytes": self.bytes(token),
                }
                for token, value in zip(ids, values, strict=True)
            ]
            others: dict[int, dict[str, Any]] = {}  # one of `logprob_token_ids` may be there twice
            for token, pair in zip(ids[1:], pairs[1:], strict=True):
                others.setdefault(token, pair)
            content.append(pairs[0] | {"top_logprobs": [*others.values()]})
        return {"content": content}

    def prompt(self, entries: Sequence[PromptEntry]) -> list[Any]:
        """`prompt_logprobs`: null for the first token, then one object a token."""
        return [
            entry
            and {
                str(token): {
                    "logprob": max(value.logprob, LEAST_LOGPROB),
                    "rank": value.rank,
                    "decoded_token": self.name(token),
                }
                for token, value in entry.items()
            }
            for entry in entries
        ]


class LegacyLogprobs:
    """The `logprobs` of one completion choice. Offsets run on from chunk to chunk."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def completion(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Of generated tokens; the chosen token stands among its alternatives."""
        return self._body(
            [
                (
                    ids[0],
                    values[0],
                    dict(zip(ids[1:] + ids[:1], values[1:] + values[:1], strict=True)),
                )
                for ids, values, _ in entries
            ]
        )

    def prompt(
        self, token_ids: Sequence[int], entries: Sequence[PromptEntry] | None
    ) -> dict[str, Any]:
        """Of an echoed prompt, whose first token has none."""
        entries = entries or [None] * len(token_ids)
        return self._body(
            [
                (token, entry and entry[token].logprob, _values(entry))
                for token, entry in zip(token_ids, entries, strict=True)
            ]
        )

    def _body(self, rows: list[tuple[int, Any, dict[int, float] | None]]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for token, value, top in rows:
            name = self._names.name(token)
            body["text_offset"].append(self._offset)
            body["token_logprobs"].append(None if value is None else max(value, LEAST_LOGPROB))
            body["tokens"].append(name)
            body["top_logprobs"].append(None if top is None else self._named(top))
            self._offset += len(name)
        return body

    def _named(self, top: dict[int, float]) -> dict[str, float]:
        return {self._names.name(token): max(lp, LEAST_LOGPROB) for token, lp in top.items()}


def _values(entry: PromptEntry) -> dict[int, float] | None:
    if entry is None:
        return None
    return {token: value.logprob for token, value in entry.items()}


def join_legacy(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Prompt and completion as one."""
    return {name: first[name] + second[name] for name in first}
