# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The layers around the routes, line by line of the HTTP contract."""

import json
from collections.abc import AsyncIterator

import pytest
from starlette.routing import Route

from llmserve.api.middleware import PROBES, route_path
from llmserve.api.routes import ROUTERS
from tests.helpers.api import MODEL, Api, events, open_api


def methods_and_paths(api: Api) -> list[tuple[str, str]]:
    routes = [route for router in ROUTERS for route in router.routes]
    routes += [route for route in api.app.routes if isinstance(route, Route)]
    assert len(routes) == len({id(route) for route in routes}) >= 15
    return [(method, r.path) for r in routes if isinstance(r, Route) for method in r.methods or ()]


def test_the_probes_are_the_only_open_paths() -> None:
    assert {"/health", "/health/live", "/health/ready", "/ping"} == PROBES


async def test_every_route_but_the_probes_wants_a_key() -> None:
    async with open_api(api_key=["one", "zwö"]) as api:
        routes = methods_and_paths(api)
        paths = {path for _, path in routes}
        assert {"/v1/chat/completions", "/metrics", "/openapi.json", "/version"} <= paths
        for method, path in [*routes, ("GET", "/nothing"), ("OPTIONS", "/v1/models")]:
            path = path.replace("{model:path}", MODEL)
            for headers, allowed in (
                ({}, False),
                ({"authorization": "Bearer two"}, False),
                ({"authorization": "Bearer "}, False),
                ({"authorization": "Basic one"}, False),
                ({"x-api-key": "on"}, False),
                ({"authorization": "bearer one"}, True),
                ({"x-api-key": "one"}, True),
                ({"authorization": "Bearer zwö".encode()}, True),
            ):
                for suffix in ("", "/", "?a=b"):
                    answer = await api.client.request(method, path + suffix, headers=headers)
                    open_path = allowed or path in PROBES
                    assert (answer.status_code != 401) == open_path, (method, path, headers)


@pytest.mark.parametrize("path", ["/health/../v1/models", "/health%2f..%2fv1/models", "//health"])
async def test_paths_that_look_like_probes_are_not(path: str) -> None:
    async with open_api(api_key=["one"]) as api:
        answer = await api.client.get(api.client.base_url.copy_with(raw_path=path.encode()))
        assert answer.status_code in (401, 404) and MODEL not in answer.text


async def test_an_empty_key_lets_nobody_in() -> None:
    async with open_api(api_key=["", "one"]) as api:
        assert (await api.client.get("/v1/models")).status_code == 401
        assert (await api.client.get("/v1/models", headers={"x-api-key": ""})).status_code == 401


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-1.2_X", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("x" * 1_000_000, False),
        ("a b", False),
        ("a/b", False),
    ],
)
async def test_request_ids(given: str, kept: bool) -> None:
    async with open_api() as api:
        headers = {"x-request-id": given}
        body = {"messages": [{"role": "user", "content": "hi"}], "request_id": "from-body"}
        for answer in (
            await api.post("/v1/chat/completions", body, headers=headers),
            await api.post("/v1/chat/completions", body | {"stream": True}, headers=headers),
            await api.post("/v1/chat/completions", {}, headers=headers),
            await api.client.get("/nothing", headers=headers),
        ):
            shown = answer.headers["x-request-id"]
            assert (shown == given) == kept
            assert 1 <= len(shown) <= 128 and answer.headers["request-id"] == shown
            assert int(answer.headers["openai-processing-ms"]) >= 0
        answer = await api.post("/v1/chat/completions", body, headers=headers)
        expected = given if kept else "from-body"
        assert answer.json()["id"] == f"chatcmpl-{expected}"


async def test_a_declared_and_an_undeclared_body_over_the_limit_are_413() -> None:
    async with open_api(max_request_bytes=1000) as api:
        headers = {"content-type": "application/json"}

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        for content in (b" " * 1001, chunks()):
            answer = await api.client.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
            assert answer.headers["connection"] == "close"
        just = json.dumps({"prompt": "hi"}).encode().ljust(1000)
        answer = await api.client.post("/v1/completions", content=just, headers=headers)
        assert answer.status_code == 200


async def test_head_options_slashes_and_case() -> None:
    async with open_api() as api:
        get, head = await api.client.get("/v1/models"), await api.client.head("/v1/models")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
        options = await api.client.options("/v1/models")
        assert (options.status_code, options.headers["allow"]) == (204, "GET")
        assert (await api.client.get("/v1/models/")).json() == get.json()
        assert (await api.complete()).status_code == 200
        for path in ("/V1/models", "/v1//models"):
            assert (await api.client.get(path)).status_code == 404


async def test_cors_only_for_listed_origins() -> None:
    async with open_api(allowed_origins=["https://a.example"], api_key=["one"]) as api:
        ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
        preflight = await api.client.options("/v1/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = await api.client.get("/v1/models", headers=ask)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        foreign = await api.client.options(
            "/v1/completions", headers=ask | {"origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in foreign.headers
    async with open_api() as api:
        answer = await api.client.get("/v1/models", headers=ask)
        assert "access-control-allow-origin" not in answer.headers


async def test_a_root_path_may_be_stripped_or_not() -> None:
    async with open_api(root_path="/llm", api_key=["one"]) as api:
        for prefix in ("", "/llm"):
            assert (await api.client.get(prefix + "/health")).status_code == 200
            assert (await api.client.get(prefix + "/v1/models")).status_code == 401
            answer = await api.client.get(prefix + "/v1/models", headers={"x-api-key": "one"})
            assert answer.status_code == 200


def test_route_path_cuts_whole_segments_only() -> None:
    for path, expected in (("/llm/health", "/health"), ("/llmx/health", "/llmx/health")):
        assert route_path({"path": path, "root_path": "/llm"}) == expected
    assert route_path({"path": "/health"}) == "/health"


async def test_a_bug_is_a_500_without_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_api() as api:
        monkeypatch.setattr(api.state, "resolve_model", lambda name: 1 / 0)
        answer = await api.chat()
        assert answer.status_code == 500
        assert "division" not in answer.text and answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"]
        monkeypatch.undo()
        assert events((await api.chat(stream=True)).text)[-1] == "[DONE]"
