# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T11 and T17: one request's code raises, or its numbers are none; T35: the Nth call of what the
system gives (memory, files, threads, processes, sockets) fails. The faults are planted from outside
the package, by tests/helpers/fault_points."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import broken_processor
from tests.helpers.fault_points import sitecustomize as points
from tests.helpers.faults import Bench

ROOT = Path(__file__).parents[2]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


def environment(folder: Path) -> dict[str, str]:
    paths = (Path(points.__file__).parent, ROOT / "src", ROOT)
    return {"PYTHONPATH": ":".join(map(str, paths)), "LLMSERVE_TEST_FAULTS": str(folder)}


@pytest.fixture(scope="module")
def planted(bench_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server in which the faults of single requests are planted."""
    flags = (
        "--logits-processors", "tests.helpers.broken_processor:Broken",
        "--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    )  # fmt: skip
    env = environment(tmp_path_factory.mktemp("faults"))
    with Bench(bench_model, *flags, env=env) as bench:
        for path, fields in ONE_REQUEST.values():  # what starts with the first of its kind
            if "seed" in fields:
                bench.server.post(path, **fields | {"seed": 1, "max_tokens": 12})
        yield bench


def chat(text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": text}]} | fields


ONE_REQUEST: dict[str, tuple[str, dict[str, Any]]] = {
    "sampler_add": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_ADD}),
    "sampler_apply": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_APPLY}),
    "sampler_update": (COMPLETIONS, {"prompt": "a", "seed": broken_processor.IN_UPDATE}),
    "grammar": (
        COMPLETIONS, {"prompt": "a", "seed": points.GRAMMAR, "response_format": FORMAT}
    ),
    "detokenizer": (COMPLETIONS, {"prompt": "a", "seed": points.DETOKENIZER}),
    "parser": chat("a", seed=points.PARSER, tools=TOOLS),
    "tokenizer": (COMPLETIONS, {"prompt": f"{points.WORD} tokenizer"}),
    "tokenizer_thread": (COMPLETIONS, {"prompt": f"{points.WORD} tokenizer" + " a" * 900}),
    "template": chat(f"{points.WORD} template"),
    "admission": (COMPLETIONS, {"prompt": "a", "seed": points.ADMISSION}),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_t11_what_is_one_requests_fails_it_alone(planted: Bench, stream: bool) -> None:
    """An error of its own, whatever the exception says; and the same request works without it."""
    with planted.load_and_invariants():
        for name, (path, fields) in ONE_REQUEST.items():
            body = fields | {"max_tokens": 12, "ignore_eos": True, "stream": stream}
            answer = planted.http.post(path, json=body)
            if stream and answer.status_code == 200:  # it had begun
                events = [e for e in answer.text.split("\n\n") if e.startswith("data: ")]
                error = json.loads(events[-1][6:])["error"]
                assert "[DONE]" not in answer.text, name
                planted.failures.append((500, events[-1][6:]))
            else:
                assert answer.status_code == 500, (name, answer.text)
                error = answer.json()["error"]
            assert error["code"] == "server_error" or error["type"] == "server_error", error
            if "seed" in body:
                answer = planted.http.post(path, json=body | {"seed": 1})
                assert answer.status_code == 200 and '"error"' not in answer.text, answer.text


def test_a_processor_that_fails_at_the_end_fails_nobody(planted: Bench) -> None:
    with planted.load_and_invariants(failed=1):
        body = {"prompt": "a", "seed": broken_processor.IN_REMOVE, "max_tokens": 3}
        assert planted.http.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize("seed", [points.NAN_PROMPT, points.NAN_LATER])
def test_t17_a_nan_that_passes(planted: Bench, seed: int) -> None:
    """NaN once, in hidden states and KV alike, of the prompt's or the 20th step: the same prompt
    then gives what it always gave, out of a cache that has nothing of it."""
    prompt = [11 + (seed + n) % 300 for n in range(200)]
    golden = planted.complete(prompt, 60, cache_salt="of the reference")["token_ids"]
    body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    with planted.load_and_invariants():
        for _ in range(3):
            failed = planted.http.post(COMPLETIONS, json=body | {"seed": seed})
            assert failed.status_code == 500, failed.text
            assert failed.json()["error"]["code"] == "numerical_error"
            again = planted.http.post(COMPLETIONS, json=body | {"return_token_ids": True}).json()
            assert again["choices"][0]["token_ids"] == golden
            assert not again["usage"]["prompt_tokens_details"]["cached_tokens"]
            prompt = body["prompt"] = [prompt[-1], *prompt[:-1]]
            golden = planted.complete(prompt, 60, cache_salt="of the reference")["token_ids"]
