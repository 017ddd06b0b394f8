# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The server's description of itself; tests/clients/test_openapi.py holds the server to it."""

from typing import Any

from llmserve.api.openapi import INTEGER, STRING, described, fields, nullable
from llmserve.api.routes.completions.schema import CompletionBody
from tests.helpers.api import open_api


async def description() -> dict[str, Any]:
    async with open_api() as api:
        return (await api.client.get("/openapi.json")).json()


def references(value: Any) -> set[str]:
    """All $ref in it."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


async def test_every_reference_is_there_and_every_route_says_how_it_fails() -> None:
    document = await description()
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known
    assert "#/components/schemas/StreamOptions" in references(document)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert set(operation["responses"]) == {"200", "default"}, path


async def test_every_answer_with_a_body_has_a_schema() -> None:
    document = await description()
    without = {
        path
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if not any(
            kind["schema"] for kind in operation["responses"]["200"].get("content", {}).values()
        )
    }
    assert without == {"/health"}


async def test_limits_of_integers_are_integers() -> None:
    document = await description()
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema["properties"]["seed"]["anyOf"][0]["maximum"] == 2**63 - 1
    assert schema["properties"]["seed"]["anyOf"][0]["minimum"] == -(2**63)
    assert isinstance(schema["properties"]["n"]["maximum"], int)
    assert schema["properties"]["temperature"]["anyOf"][0]["maximum"] == 2.0


def test_fields_read_by_hand_are_required_unless_they_may_be_null() -> None:
    extra = described(fields(a=INTEGER), CompletionBody, prompt=STRING, other=nullable(STRING))
    schema = extra["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert "other" not in schema["properties"]  # no field of this body
