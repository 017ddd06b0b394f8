# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Chat chunks: a role chunk for each choice, text, a finish chunk, and usage where asked for."""

from typing import Any

from llmserve.api.answer import Answer, encode
from llmserve.api.generation import Generation, num_logprobs
from llmserve.api.logprobs import TokenNames
from llmserve.api.routes.chat.parts import View
from llmserve.api.routes.chat.schema import ChatBody
from llmserve.core.outputs import Delta


class ChatWriter:
    """An EventWriter. `echo` is the text that each choice begins with."""

    def __init__(
        self,
        answer: Answer,
        body: ChatBody,
        generation: Generation,
        names: TokenNames,
        role: str,
        echo: str,
        prompt: dict[str, Any],
        view: View,
    ) -> None:
        self._answer = answer
        self._generation = generation
        self._names = names
        self._token_ids = body.return_token_ids
        self._echo = echo
        self._prompt = prompt  # prompt_token_ids, prompt_text: in the first chunk of a choice
        self._role = b'"delta":' + encode({"role": role, "content": ""})
        self._wants_logprobs = body.logprobs
        self._num_begun = 0
        self._view = view
        self._calling: set[int] = set()  # choices with calls

    def num_logprobs(self, deltas: list[Delta]) -> int:
        """See EventWriter."""
        return num_logprobs(deltas) if self._wants_logprobs else 0

    def events(self, deltas: list[Delta]) -> bytes:
        """Framed chunks for what is new; empty while only silent tokens came."""
        out: list[bytes] = []
        for delta in deltas:
            while self._num_begun <= delta.index:  # in order, as the SDKs gather them
                self._begin(self._num_begun, out)
                self._num_begun += 1
            if self._view.parses:
                self._see(delta)
            fields = self._view.delta(delta) if delta.parts else None
            if fields:
                inside = b'"delta":' + encode(fields)
            elif delta.text:
                inside = b'"delta":{"content":' + encode(delta.text) + b"}"
            elif delta.finish_reason or delta.logprobs or self._token_ids:
                inside = b'"delta":{}' if delta.finish_reason else b'"delta":{"content":""}'
            else:
                continue
            out.append(
                self._answer.chunk(
                    delta.index,
                    inside,
                    delta,
                    logprobs=self._names.chat(delta.logprobs) if delta.logprobs else None,
                    token_ids=self._token_ids,
                    usage=self._usage(),
                )
            )
        return b"".join(out)

    def _see(self, delta: Delta) -> None:
        """Takes out what the client is not to see, and says why the choice ends."""
        view = self._view
        if any(part.kind == "call" for part in delta.parts):
            self._calling.add(delta.index)
        calls = delta.index in self._calling
        delta.finish_reason = view.finish_reason(delta.finish_reason, delta.stop_reason, calls)
        delta.token_ids = view.shown(delta.token_ids, delta.hidden)
        if delta.logprobs is not None:
            delta.logprobs = view.shown(delta.logprobs, delta.hidden)

    def _begin(self, index: int, out: list[bytes]) -> None:
        out.append(self._answer.chunk(index, self._role, usage=self._usage(), extra=self._prompt))
        if self._echo:
            inside = b'"delta":{"content":' + encode(self._echo) + b"}"
            out.append(self._answer.chunk(index, inside, usage=self._usage()))

    def _usage(self) -> dict[str, Any] | None:
        return self._generation.usage() if self._answer.continuous_usage else None

    def tail(self) -> bytes:
        """The usage chunk, where asked for."""
        return self._answer.usage_event(self._generation.usage())
