# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The ASGI application: layers, error bodies, routes."""

import ipaddress

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llmserve import __version__, envs
from llmserve.api import errors, openapi
from llmserve.api.middleware import Auth, BodyLimit, Envelope, Gate, HostCheck, key_digests
from llmserve.api.routes import ROUTERS
from llmserve.api.state import AppState
from llmserve.config.server import ServerConfig

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
    refused = state.metrics.edge.refuse
    app.add_middleware(BodyLimit, limit=server.max_request_bytes, refused=refused)
    keys = server.api_key or ([envs.API_KEY] if envs.API_KEY else [])
    digests = key_digests(keys)
    state.num_keys = len(digests)
    several = len(digests) > 1 and server.prefix_cache_scope == "auto"
    salts = digests if several or server.prefix_cache_scope == "key" else []
    app.add_middleware(Gate, state=state, salts=salts)
    if keys:
        app.add_middleware(Auth, keys=keys, refused=refused)
    if server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    if "*" not in server.allowed_hosts and (server.allowed_hosts or _is_loopback(server)):
        names = [server.host, *server.allowed_hosts]
        app.add_middleware(HostCheck, names=names, refused=refused)
    app.add_middleware(Envelope, root_path=server.root_path)
    return app


def _is_loopback(server: ServerConfig) -> bool:
    if server.uds:
        return False
    try:
        return ipaddress.ip_address(server.host).is_loopback
    except ValueError:
        return server.host.lower() == "localhost"
