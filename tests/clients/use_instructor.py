# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everyday operations of instructor. Run by others.py, in an environment that has instructor."""

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    """What it is like."""

    sky: Literal["clear", "cloudy"]
    windy: bool


def main() -> None:
    """A model of the answer, by a schema and by a tool; whole, in part, and with its raw."""
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Now"}], "seed": 1}
    made = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    answer, raw = made.chat.completions.create_with_completion(
        response_model=Weather, max_retries=0, **asked
    )
    assert isinstance(answer, Weather) and raw.usage.completion_tokens > 0
    parts = list(made.chat.completions.create_partial(response_model=Weather, **asked))
    assert parts[-1].model_dump() == answer.model_dump()
    by_tool = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    assert isinstance(
        by_tool.chat.completions.create(response_model=Weather, max_retries=0, **asked), Weather
    )
    parts = list(by_tool.chat.completions.create_partial(response_model=Weather, **asked))
    Weather.model_validate(parts[-1].model_dump())
    thinker = instructor.from_openai(
        openai.OpenAI(base_url=sys.argv[2], api_key="none", max_retries=0),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    answer = thinker.chat.completions.create(
        response_model=Weather,
        max_retries=0,
        extra_body={"thinking_token_budget": 5},
        **asked,
    )
    assert isinstance(answer, Weather)
    print("all is well")


main()
