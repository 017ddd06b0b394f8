# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The application as a whole."""

import os
import subprocess
import sys

from tests.helpers.api import open_api


async def test_requests_are_turned_away_until_the_engine_is_attached() -> None:
    async with open_api(ready=False) as api:
        for path in ("/health", "/health/ready", "/ping", "/v1/models", "/v1/models/x"):
            answer = await api.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting"), path
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            answer = await api.client.post(path, content=b"not even read")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "starting"), path
        for path in ("/health/live", "/version", "/metrics", "/load", "/openapi.json"):
            assert (await api.client.get(path)).status_code == 200, path


async def test_the_description_has_the_fields_of_each_body() -> None:
    async with open_api() as api:
        paths = (await api.client.get("/openapi.json")).json()["paths"]
    for path, field in (
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/detokenize", "tokens"),
    ):
        body = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert field in body["properties"]


def test_the_api_process_imports_no_torch() -> None:
    code = (
        "import sys, llmserve.api.server; "
        "sys.exit(', '.join({'torch', 'transformers', 'xgrammar', 'triton'} & {*sys.modules}) or 0)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (run.returncode, run.stderr) == (0, "")
