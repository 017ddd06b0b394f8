# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Requests made up from the server's own description: never a 5xx, always an answer as described.

schemathesis makes the requests, half of them against the description, and checks the answers.
"""

from collections import Counter
from random import Random
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.server import Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FEW = 5  # fields beside the required ones: with all at once, some rule between them always breaks


def tame(body: dict[str, Any], random: Random) -> None:
    """Makes a well-formed body one that this server may serve: its model, its token ids, and so few
    tokens that the engine's speed does not count."""
    optional = sorted(body.keys() - {"messages", "prompt", "tokens", "model"})
    for name in random.sample(optional, max(0, len(optional) - FEW)):
        del body[name]
    if "model" in body:
        body["model"] = "tiny"
    if "prompt" in body and "messages" in body:
        del body[random.choice(["prompt", "messages"])]
    if all(body.get(name) is None for name in ("prompt", "messages", "tokens")):
        body["prompt"] = "x"
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of", "min_tokens"):
        if isinstance(body.get(name), int | float):
            body[name] = 1 + abs(int(body[name])) % 4
    for name in ("prompt", "allowed_token_ids", "stop_token_ids", "tokens"):
        body.update({name: _small(body[name])} if name in body else {})
    if isinstance(body.get("logit_bias"), dict):
        body["logit_bias"] = {str(int(k) % 384): bias for k, bias in body["logit_bias"].items()}


def _small(value: Any) -> Any:
    if isinstance(value, list):
        return [_small(item) for item in value]
    return int(value) % 384 if isinstance(value, int | float) else value


def fuzz(server: Server, examples: int) -> Counter[str]:
    """How often each operation answered in each hundred of statuses, to bodies good and bad."""
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    counts: Counter[str] = Counter()
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                _ask(session, operation, mode, examples, counts)
    return counts


def _ask(
    session: requests.Session,
    operation: Any,
    mode: GenerationMode,
    examples: int,
    counts: Counter[str],
) -> None:
    good = mode is GenerationMode.POSITIVE

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        case=operation.as_strategy(generation_mode=mode),
        random=strategies.randoms(use_true_random=False),
    )
    def once(case: Any, random: Random) -> None:
        if good and isinstance(case.body, dict):
            tame(case.body, random)
        answer = case.call(session=session)
        case.validate_response(answer, checks=CHECKS)
        name = f"{operation.method} {operation.path} {'good' if good else 'bad'}"
        counts[f"{name} {answer.status_code // 100}xx"] += 1

    once()


def check(server: Server, examples: int) -> None:
    """Enough was served for the answers to mean something."""
    counts = fuzz(server, examples)
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert counts[f"post {path} good 2xx"] >= examples / 8, (path, counts)
        assert counts[f"post {path} bad 4xx"] > 0, counts


def test_a_few_requests(server: Server) -> None:
    check(server, 12)


@pytest.mark.long
def test_many_requests(server: Server) -> None:
    check(server, 300)
