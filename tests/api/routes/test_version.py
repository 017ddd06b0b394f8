# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /version."""

from llmserve import __version__
from tests.helpers.api import open_api


async def test_version() -> None:
    async with open_api() as api:
        assert (await api.client.get("/version")).json() == {"version": __version__}
