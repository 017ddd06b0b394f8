# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve complete`: a running server continues texts."""

import contextlib
from dataclasses import dataclass
from typing import Any

from llmserve.cli.args import parse_flags, take
from llmserve.cli.client import DEFAULT_URL, Client, lines
from llmserve.config.flag import flag, positive


@dataclass(frozen=True)
class CompleteOptions:
    """Server and completion."""

    url: str = flag(DEFAULT_URL, "The server.")
    model_name: str | None = flag(None, "Model; default is the server's first.")
    api_key: str | None = flag(None, "Key of the server; default is LLMSERVE_API_KEY.")
    quick: str | None = flag(None, "Continue this one text and end.", short="-q")
    max_tokens: int = flag(128, "Most tokens of a completion.", check=positive)
    temperature: float | None = flag(None, "Sampling temperature; default is the model's.")


def complete(client: Client, body: dict[str, Any], prompt: str) -> None:
    """Prints `prompt`'s continuation as it comes. Ctrl-C ends it early."""
    with contextlib.closing(client.stream("/v1/completions", body | {"prompt": prompt})) as events:
        try:
            for event in events:
                for choice in event["choices"]:
                    print(choice["text"], end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()


def run(argv: list[str]) -> int:
    """Completes line by line until the input ends."""
    flags = parse_flags(
        argv, (CompleteOptions,), prog="llmserve complete", model_tag=False, vllm=False,
        description="Let a running server continue a text.",
    )  # fmt: skip
    options = take(flags, CompleteOptions)
    client = Client(options.url, options.api_key)
    body: dict[str, Any] = {
        "model": options.model_name or client.model(),
        "max_tokens": options.max_tokens,
    }
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.quick is not None:
        complete(client, body, options.quick)
        return 0
    for text in lines():
        if text:
            complete(client, body, text)
    return 0
