# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Forced tool calls on a running server: are all arguments valid under the tool's schema?

    python -m benchmarks.tool_calls [--url http://127.0.0.1:8000] [--runs 200] [--clients 8]

Half of the runs ask for tool_choice "required", half for a named strict tool, at temperature 1.
"""

import argparse
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema

MAX_TOKENS = 200
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "days", "unit"],
        "additionalProperties": False,
    },
    "send_message": {
        "type": "object",
        "properties": {
            "to": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
            "text": {"type": "string"},
            "urgent": {"type": "boolean"},
        },
        "required": ["to", "text"],
        "additionalProperties": False,
    },
}
TASKS = ("What will the weather be in Oslo?", "Tell Ann and Bob that I am late.", "Hi!")


def judge(http: httpx.Client, model: str, seed: int) -> str:
    """One run: "valid", "cut" by length, or what is wrong."""
    rng = random.Random(seed)
    name = rng.choice(list(SCHEMAS)) if seed % 2 else None
    tools = [
        {"type": "function", "function": {"name": n, "parameters": s, "strict": True}}
        for n, s in SCHEMAS.items()
    ]
    named = {"type": "function", "function": {"name": name}}
    answer = http.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": rng.choice(TASKS)}],
            "tools": tools,
            "tool_choice": "required" if name is None else named,
            "temperature": 1,
            "seed": seed,
            "max_tokens": MAX_TOKENS,
        },
    )
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text[:200]}"
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "length":
        return "cut"
    calls = choice["message"].get("tool_calls") or []
    if not calls:
        return "no call"
    for call in calls:
        function = call["function"]
        if name is not None and function["name"] != name:
            return f"called {function['name']}"
        schema = SCHEMAS[function["name"]]
        if not jsonschema.Draft202012Validator(schema).is_valid(json.loads(function["arguments"])):
            return f"invalid {function['arguments']}"
    return "valid"


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    with (
        httpx.Client(base_url=args.url, timeout=600) as http,
        ThreadPoolExecutor(args.clients) as pool,
    ):
        model = http.get("/v1/models").json()["data"][0]["id"]
        for kind, first in (("required", 0), ("named", 1)):
            seeds = range(first, args.runs, 2)
            print(kind, dict(Counter(pool.map(lambda s: judge(http, model, s), seeds))), flush=True)


if __name__ == "__main__":
    main()
