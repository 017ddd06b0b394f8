# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The layers around the routes, line by line of the HTTP contract."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
from starlette.routing import Route

from llmserve.api import state as state_module
from llmserve.api.middleware import PROBES, UNQUEUED, route_path
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
    async with open_api(api_key=["one"]) as api:
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


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("app.localhost", True),
        ("mine.example:8000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example:localhost", False),
        ("x@localhost", False),
    ],
)
async def test_hosts(host: str, passes: bool) -> None:
    async with open_api(allowed_hosts=["Mine.example"], api_key=["k"]) as api:
        headers = {"host": host, "x-api-key": "k"}
        for path in ("/v1/models", "/health"):
            answer = await api.client.get(path, headers=headers)
            assert answer.status_code == (200 if passes else 403), path
        assert passes or api.state.metrics.edge.refused["host"] == 2


@pytest.mark.parametrize(
    ("config", "checked"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "allowed_hosts": ["a"]}, True),
        ({"allowed_hosts": ["*"]}, False),
        ({"uds": "/tmp/some.sock"}, False),
    ],
)
async def test_where_hosts_are_checked(config: dict[str, object], checked: bool) -> None:
    async with open_api(**config) as api:
        answer = await api.client.get("/health", headers={"host": "evil.example"})
        assert answer.status_code == (403 if checked else 200)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e3", "x", "99999999999", "86400001", "²"])
async def test_a_deadline_that_is_no_time_is_400(text: str) -> None:
    async with open_api() as api:
        body = {"prompt": "hi"}
        headers = {"x-request-timeout-ms": text.encode()}
        answer = await api.post("/v1/completions", body, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("X-Request-Timeout-Ms", "invalid_value")
        assert api.state.metrics.edge.refused["deadline_header"] == 1


@pytest.mark.parametrize(
    ("most", "asked", "seconds"),
    [(0.0, None, None), (0.0, "5000", 5), (9.0, None, 9), (9.0, "5000", 5), (2.0, "5000", 2)],
)
async def test_the_engine_hears_of_the_nearer_deadline(
    most: float, asked: str | None, seconds: int | None
) -> None:
    async with open_api(request_timeout=most) as api:
        headers = {} if asked is None else {"X-Request-Timeout-Ms": asked}
        answer = await api.post("/v1/completions", {"prompt": "hi"}, headers=headers)
        assert answer.status_code == 200
        (request,) = api.engine.requests
        left = request.deadline - time.monotonic()
        assert request.deadline == 0 if seconds is None else seconds - 1 < left < seconds


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("silent", [True, False])
async def test_an_engine_that_does_not_keep_the_deadline_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, stream: bool, silent: bool
) -> None:
    monkeypatch.setattr(state_module, "_DEADLINE_GRACE_S", 0.05)
    async with open_api() as api:
        api.engine.hold, api.engine.delay = silent, 0.04
        body = {"prompt": "hi", "stream": stream, "max_tokens": 50}
        headers = {"x-request-timeout-ms": "60"}
        answer = await api.post("/v1/completions", body, headers=headers)
        if stream and not silent:
            assert events(answer.text)[-1]["error"]["code"] == "request_timeout"
        else:
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "request_timeout"
        assert api.engine.aborted == [api.engine.requests[0].request_id]


async def test_a_key_has_its_share_of_places() -> None:
    async with open_api(api_key=["a", "b"], max_requests_per_key=2) as api:
        api.engine.hold = True
        a, b = {"x-api-key": "a"}, {"x-api-key": "b"}
        body = {"prompt": "hi"}
        held = [
            asyncio.ensure_future(api.post("/v1/completions", body, headers=a)) for _ in range(2)
        ]
        while len(api.engine.requests) < 2:
            await asyncio.sleep(0.01)
        refused = await api.client.post("/v1/completions", content=b"{", headers=a)
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await api.post("/tokenize", body, headers=a)).status_code == 200
        api.engine.release()
        assert (await api.post("/v1/completions", body, headers=b)).status_code == 200
        assert [(await one).status_code for one in held] == [200, 200]
        assert (await api.post("/v1/completions", body, headers=a)).status_code == 200
        assert {request.tenant for request in api.engine.requests} == {0, 1}
        assert not api.state.board.places(0) and not api.state.board.places(1)


async def test_a_full_queue_refuses_before_the_body_is_read() -> None:
    async with open_api() as api:
        model = api.state.llm.model  # type: ignore[union-attr]
        model.max_num_seqs, model.max_num_queued_reqs, model.max_num_queued_tokens = 1, 1, 100
        api.engine.hold = True
        held = [asyncio.ensure_future(api.complete()) for _ in range(2)]
        while len(api.engine.requests) < 2:
            await asyncio.sleep(0.01)
        read = False

        async def content() -> AsyncIterator[bytes]:
            nonlocal read
            read = True
            yield b"{}"

        refused = await api.client.post("/v1/completions", content=content())
        assert refused.status_code == 503 and not read
        assert refused.json()["error"]["code"] == "server_is_overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await api.client.get("/health")).status_code == 200  # overload is not unreadiness
        api.engine.release()
        assert [(await one).status_code for one in held] == [200, 200]
        api.engine.stats.num_waiting_tokens = 99
        assert (await api.complete()).status_code == 200
        api.engine.stats.num_waiting_tokens = 100
        assert (await api.complete()).status_code == 503
        refusals = api.state.metrics.edge.refused
        assert refusals["queue_full"] == refusals["queue_tokens"] == 1


async def test_every_post_route_takes_a_place_unless_it_is_listed() -> None:
    async with open_api(max_requests_per_key=1) as api:
        api.state.take_place(0)
        posts = {path for method, path in methods_and_paths(api) if method == "POST"}
        assert {"/v1/completions", "/v1/chat/completions"} <= posts and posts >= UNQUEUED
        for path in posts:
            status = (await api.post(path, {})).status_code
            assert (status == 429) == (path not in PROBES | UNQUEUED), path


@pytest.mark.parametrize(
    ("keys", "scope", "apart"),
    [
        (["key one", "key two"], "auto", True),
        (["key one", "key two"], "global", False),
        (["key one", "key two"], "key", True),
        (["key one"], "auto", False),
        (["key one"], "key", True),
    ],
)
async def test_cached_prefixes_go_by_key(keys: list[str], scope: str, apart: bool) -> None:
    async with open_api(api_key=keys, prefix_cache_scope=scope) as api:
        for key in keys:
            for salt in ({}, {"cache_salt": "s"}, {"cache_salt": "s"}):
                body = {"prompt": "hi"} | salt
                answer = await api.post("/v1/completions", body, headers={"x-api-key": key})
                assert answer.status_code == 200
        salts = [request.cache_salt for request in api.engine.requests]
        assert len(set(salts)) == (2 * len(keys) if apart else 2)
        assert (salts[0] != "") == apart and salts[1] == salts[2]
        assert not any(key in salt for key in keys for salt in salts)


@pytest.mark.parametrize(
    "body", [b'{"prompt":' + b"[" * 100_000, b'{"x":[' + b"{}," * 200_000 + b'{}],"prompt":"a"}']
)
async def test_json_that_is_too_much_is_a_400(body: bytes) -> None:
    async with open_api() as api:
        headers = {"content-type": "application/json"}
        answer = await api.client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "json_too_complex"
        assert api.state.metrics.edge.refused["json_bounds"] == 1


async def test_a_body_that_is_still_coming_holds_no_place() -> None:
    async with open_api(max_requests_per_key=1) as api:
        more = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b'{"prompt": '
            await more.wait()
            yield b'"hi"}'

        headers = {"content-type": "application/json"}
        stream = api.client.post("/v1/completions", content=slow(), headers=headers)
        waiting = asyncio.ensure_future(stream)
        await asyncio.sleep(0.05)
        assert (await api.complete()).status_code == 200
        api.state.take_place(0)
        more.set()
        assert (await waiting).status_code == 429
        api.state.leave_place(0)
        assert not api.state.board.places(0)
