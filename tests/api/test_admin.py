# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The operator's routes: on their socket, and nowhere else."""

import asyncio
import os
import signal
import socket
import stat
from pathlib import Path

import httpx
import pytest

from llmserve.api.admin import build_admin, router
from llmserve.api.server import serve
from llmserve.config.server import ServerConfig
from llmserve.core.messages import UtilityCall, UtilityResult
from llmserve.errors import ConfigError
from llmserve.frontend.async_llm import AsyncLLM
from tests.helpers.api import ScriptedEngine, make_llm, open_api


class AnsweringEngine(ScriptedEngine):
    """Utility calls have `value` as their answer."""

    value: object = True

    def send(self, message: object) -> None:
        if isinstance(message, UtilityCall):
            self.calls = [*getattr(self, "calls", []), message.method]
            self.push(UtilityResult(message.call_id, self.value))
        else:
            super().send(message)  # type: ignore[arg-type]


async def test_no_admin_route_is_public() -> None:
    paths = {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert paths == {"/reset_prefix_cache", "/stats"}
    async with open_api() as api:
        for path in paths:
            for method in ("GET", "POST"):
                answer = await api.client.request(method, path)
                assert answer.status_code == 404, path
        assert "/reset_prefix_cache" not in (await api.client.get("/openapi.json")).text


@pytest.mark.parametrize(("emptied", "status"), [(True, 200), (False, 409)])
async def test_the_socket_is_the_owners_and_resets_the_cache(
    tmp_path: Path, emptied: bool, status: int
) -> None:
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # as a killed server leaves it
    engine = AnsweringEngine()
    engine.value = emptied

    async def connect() -> AsyncLLM:
        return make_llm(engine)

    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    config = ServerConfig(admin_socket=str(path), api_key=["k"], disable_uvicorn_access_log=True)
    task = asyncio.ensure_future(serve(config, sock, connect))
    transport = httpx.AsyncHTTPTransport(uds=str(path), retries=20)
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
        for _ in range(200):
            try:
                answer = await admin.post("/reset_prefix_cache")
            except httpx.ConnectError:
                answer = None
            if answer is not None and answer.status_code != 503:
                break
            await asyncio.sleep(0.02)
        assert answer is not None and answer.status_code == status
        assert "reset_prefix_cache" in engine.calls
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await admin.get("/v1/models")).status_code == 404
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as public:
        headers = {"authorization": "Bearer k"}
        assert (await public.post("/reset_prefix_cache", headers=headers)).status_code == 404
    signal_self()
    await asyncio.wait_for(task, 10)
    assert not path.exists()
    sock.close()
    engine.close()


def signal_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["nowhere", "file", "folder", "served"])
async def test_a_socket_that_cannot_be_had_is_one_line(tmp_path: Path, kind: str) -> None:
    """And what is there stays as it is."""
    engine = ScriptedEngine()
    path = tmp_path / "admin.sock" if kind != "nowhere" else tmp_path / "no" / "admin.sock"
    other = socket.socket(socket.AF_UNIX)
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "served":
        other.bind(str(path))
        other.listen()
    before = path.lstat() if path.exists() else None

    async def connect() -> AsyncLLM:
        return make_llm(engine)

    sock = socket.create_server(("127.0.0.1", 0))
    config = ServerConfig(admin_socket=str(path))
    says = "No such file" if kind == "nowhere" else "Address already in use"
    with pytest.raises(ConfigError, match=f"cannot listen on .*admin.sock: {says}"):
        await asyncio.wait_for(serve(config, sock, connect), 10)
    assert before == (path.lstat() if path.exists() else None)
    sock.close()
    other.close()
    engine.close()


async def test_it_answers_in_the_shape_of_the_api() -> None:
    async with open_api(ready=False) as api:
        transport = httpx.ASGITransport(build_admin(api.state))
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
            answer = await admin.post("/reset_prefix_cache")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "starting"
            assert (await admin.get("/docs")).status_code == 404
