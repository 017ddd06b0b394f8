# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The probes, in each phase."""

import asyncio

from llmserve.api.state import Phase
from tests.helpers.api import open_api


async def test_ready_follows_the_phase_and_live_only_the_engine() -> None:
    async with open_api() as api:
        cases: list[tuple[Phase, int, str | None]] = [
            ("starting", 503, "starting"),
            ("ready", 200, None),
            ("draining", 503, "draining"),
        ]
        for phase, status, code in cases:
            api.state.phase = phase
            for path in ("/health", "/health/ready", "/ping"):
                answer = await api.client.get(path)
                assert answer.status_code == status
                assert (answer.json()["error"]["code"] if code else answer.content) == (code or b"")
            assert (await api.client.get("/health/live")).status_code == 200
        assert (await api.client.post("/ping")).status_code == 503
        api.state.phase = "ready"
        api.engine.die()
        await asyncio.sleep(0.01)
        assert (await api.client.get("/health")).json()["error"]["code"] == "engine_dead"
        assert (await api.client.get("/health/live")).status_code == 503


async def test_load_counts_what_runs() -> None:
    async with open_api() as api:
        api.engine.hold = True
        asking = [asyncio.ensure_future(api.chat(stream=stream)) for stream in (True, False)]
        await asyncio.sleep(0.05)
        assert (await api.client.get("/load")).json() == {"server_load": 2}
        api.engine.release()
        await asyncio.gather(*asking)
        assert (await api.client.get("/load")).json() == {"server_load": 0}
