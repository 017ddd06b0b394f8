# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The ASGI application: layers, error bodies, routes."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llmserve import __version__, envs
from llmserve.api import errors, openapi
from llmserve.api.middleware import Auth, BodyLimit, Envelope
from llmserve.api.routes import ROUTERS
from llmserve.api.state import AppState

_EXPOSED_HEADERS = ("x-request-id", "retry-after", "openai-processing-ms")


def build_app(state: AppState) -> FastAPI:
    """Routes answer 503 until `state.attach` has been given an engine."""
    server = state.server
    app = FastAPI(
        title="llmserve",
        version=__version__,
        redirect_slashes=False,
    )
    app.state.llmserve = state
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=server.max_request_bytes)
    keys = server.api_key or ([envs.API_KEY] if envs.API_KEY else [])
    if keys:
        app.add_middleware(Auth, keys=keys)
    if server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    app.add_middleware(Envelope, root_path=server.root_path)
    return app
