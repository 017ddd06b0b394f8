# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve chat`: a conversation with a running server."""

import contextlib
from dataclasses import dataclass
from typing import Any

from llmserve.cli.args import parse_flags, take
from llmserve.cli.client import DEFAULT_URL, Client, lines
from llmserve.config.flag import flag


@dataclass(frozen=True)
class ChatOptions:
    """Server and conversation."""

    url: str = flag(DEFAULT_URL, "The server.")
    model_name: str | None = flag(None, "Model; default is the server's first.")
    api_key: str | None = flag(None, "Key of the server; default is LLMSERVE_API_KEY.")
    system_prompt: str | None = flag(None, "System message at the top of the conversation.")
    quick: str | None = flag(None, "Ask this one thing and end.", short="-q")
    max_tokens: int | None = flag(None, "Most tokens of an answer.")
    temperature: float | None = flag(None, "Sampling temperature; default is the model's.")


def answer(client: Client, body: dict[str, Any], messages: list[dict[str, str]]) -> None:
    """Prints the answer to `messages` as it comes, and adds it to them. Ctrl-C ends it early."""
    parts: list[str] = []
    with contextlib.closing(
        client.stream("/v1/chat/completions", body | {"messages": messages})
    ) as events:
        try:
            for event in events:
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    parts.append(text)
                    print(text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    messages.append({"role": "assistant", "content": "".join(parts)})


def run(argv: list[str]) -> int:
    """Talks until the input ends."""
    flags = parse_flags(
        argv, (ChatOptions,), prog="llmserve chat", model_tag=False, vllm=False,
        description="Talk to a running server. Ctrl-C stops an answer, Ctrl-D ends.",
    )  # fmt: skip
    options = take(flags, ChatOptions)
    client = Client(options.url, options.api_key)
    body: dict[str, Any] = {"model": options.model_name or client.model()}
    for name in ("max_tokens", "temperature"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    messages: list[dict[str, str]] = []
    if options.system_prompt:
        messages.append({"role": "system", "content": options.system_prompt})
    if options.quick is not None:
        answer(client, body, [*messages, {"role": "user", "content": options.quick}])
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing in input()
    print(f"{body['model']} at {options.url}. Ctrl-D ends.")
    for text in lines():
        if text.strip():
            messages.append({"role": "user", "content": text})
            answer(client, body, messages)
    return 0
