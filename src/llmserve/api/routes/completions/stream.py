# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Completion chunks: text of each choice, a finish chunk, and usage where asked for."""

from typing import Any

from llmserve.api.answer import Answer, encode
from llmserve.api.generation import Generation, num_logprobs
from llmserve.api.logprobs import LegacyLogprobs, TokenNames, join_legacy
from llmserve.api.routes.completions.schema import CompletionBody
from llmserve.core.outputs import Delta


class CompletionWriter:
    """An EventWriter. `echoes[i]` is the text that the choices of prompt i begin with."""

    def __init__(
        self,
        answer: Answer,
        body: CompletionBody,
        generation: Generation,
        names: TokenNames,
        echoes: list[str],
    ) -> None:
        self._answer = answer
        self._body = body
        self._generation = generation
        self._echoes = echoes
        count = generation.remaining
        self._logprobs = [LegacyLogprobs(names) for _ in range(count)]
        self._begun: set[int] = set()

    def num_logprobs(self, deltas: list[Delta]) -> int:
        """See EventWriter."""
        if self._body.logprobs is None:
            return 0
        streams, n = self._generation.streams, self._generation.n
        new = (delta.index for delta in deltas if delta.index not in self._begun)
        echoed = sum(streams[index // n].num_prompt_logprobs for index in new)
        return echoed + num_logprobs(deltas)

    def events(self, deltas: list[Delta]) -> bytes:
        """Framed chunks for what is new; empty while only silent tokens came."""
        out: list[bytes] = []
        for delta in deltas:
            ids = self._body.return_token_ids
            extra: dict[str, Any] | None = None
            text = delta.text
            legacy = self._logprobs[delta.index]
            scored: dict[str, Any] | None = None
            if delta.index not in self._begun:
                self._begun.add(delta.index)
                stream = self._generation.streams[delta.index // self._generation.n]
                text = self._echoes[delta.index // self._generation.n] + text
                if ids:
                    extra = {"prompt_token_ids": stream.prompt_token_ids}
                if self._body.echo and self._body.logprobs is not None:
                    scored = legacy.prompt(stream.prompt_token_ids, stream.prompt_logprobs)
            logprobs = legacy.completion(delta.logprobs) if delta.logprobs else None
            if scored is not None:
                logprobs = join_legacy(scored, logprobs) if logprobs else scored
            if not (text or delta.finish_reason or logprobs or ids):
                continue
            out.append(
                self._answer.chunk(
                    delta.index,
                    b'"text":' + encode(text),
                    delta,
                    logprobs=logprobs,
                    token_ids=ids,
                    usage=self._generation.usage() if self._answer.continuous_usage else None,
                    extra=extra,
                )
            )
        return b"".join(out)

    def tail(self) -> bytes:
        """The usage chunk, where asked for."""
        return self._answer.usage_event(self._generation.usage())
