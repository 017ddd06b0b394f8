# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of litellm. Run by others.py, in an environment that has litellm."""

import asyncio
import sys
from typing import Any

import litellm

COMMON: dict[str, Any] = {"api_base": sys.argv[1], "api_key": "none", "max_retries": 0}
MODEL = "hosted_vllm/tiny"
MESSAGES = [{"role": "user", "content": "Was it the first?"}]


def raised(kind: type[Exception], **asked: Any) -> Exception:
    """The exception of a request that is to be refused."""
    try:
        litellm.completion(**(COMMON | {"model": MODEL, "messages": MESSAGES} | asked))
    except kind as error:
        return error
    raise AssertionError(f"{asked} was not refused")


def main() -> None:
    """Whole, streamed, asynchronous, embedded in a router; and what refusals become."""
    for provider in ("openai", "hosted_vllm"):
        asked = COMMON | {"model": f"{provider}/tiny", "messages": MESSAGES, "max_tokens": 8}
        whole = litellm.completion(**asked, seed=3)
        assert 0 < whole.usage.completion_tokens <= 8
        assert whole.choices[0].finish_reason in ("stop", "length")
        chunks = list(
            litellm.completion(**asked, seed=3, stream=True, stream_options={"include_usage": True})
        )
        rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert rebuilt.choices[0].message.content == whole.choices[0].message.content
        assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
        text = asyncio.run(litellm.acompletion(**asked, seed=3)).choices[0].message.content
        assert text == whole.choices[0].message.content
    logprobs = litellm.completion(
        **COMMON, model=MODEL, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert len(logprobs.choices[0].logprobs.content[0].top_logprobs) == 2
    completed = litellm.text_completion(
        **COMMON, model="text-completion-openai/tiny", prompt=["The quick", "brown"], max_tokens=4
    )
    assert [choice.index for choice in completed.choices] == [0, 1]
    router = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": COMMON | {"model": MODEL}}]
    )
    assert router.completion(model="m", messages=MESSAGES, max_tokens=2).choices

    too_long = [{"role": "user", "content": "word " * 999}]
    raised(litellm.ContextWindowExceededError, messages=too_long)
    raised(litellm.BadRequestError, temperature=3)
    raised(litellm.NotFoundError, model="hosted_vllm/gone")
    print("all is well")


main()
