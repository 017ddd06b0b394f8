# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /metrics for Prometheus."""

from fastapi import APIRouter, Request, Response

from llmserve.api.openapi import STRING, described
from llmserve.api.state import state_of

router = APIRouter()


@router.get("/metrics", openapi_extra=described(STRING, media_type="text/plain"))
async def metrics(request: Request) -> Response:
    """The text format; answered while the engine starts, too."""
    page = state_of(request).metrics
    return Response(page.render(), media_type=page.content_type)
