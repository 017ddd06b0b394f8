# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What only the operator may do: routes on a unix socket of their own, never on the public port.

Who may connect is a matter of the socket's file mode, so there are no keys here.
"""

from fastapi import APIRouter, FastAPI, Request, Response

from llmserve.api import errors
from llmserve.api.answer import json_response
from llmserve.api.errors import HttpError
from llmserve.api.middleware import BodyLimit, Envelope
from llmserve.api.state import AppState, state_of

router = APIRouter()
_MAX_BODY_BYTES = 1 << 20


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all cached prefixes; 409 while requests run."""
    if not await state_of(request).engine().reset_prefix_cache():
        raise HttpError(409, "Requests are running; their prefixes are in use.", code="busy")
    return Response(status_code=200)


@router.get("/stats")
async def stats(request: Request) -> Response:
    """The engine's gauges and counters, asked of the engine itself."""
    return json_response(await state_of(request).engine().call("stats"))


def build_admin(state: AppState) -> FastAPI:
    """The application of `--admin-socket`."""
    app = FastAPI(title="llmserve admin", openapi_url=None, redirect_slashes=False)
    app.state.llmserve = state
    errors.install(app)
    app.include_router(router)
    app.add_middleware(BodyLimit, limit=_MAX_BODY_BYTES, refused=state.metrics.edge.refuse)
    app.add_middleware(Envelope, root_path="")
    return app
