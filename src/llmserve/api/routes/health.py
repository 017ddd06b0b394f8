# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Probes. Ready is for routing, live is for restarting; neither costs the engine anything."""

from fastapi import APIRouter, Request, Response

from llmserve.api.answer import json_response
from llmserve.api.openapi import INTEGER, STRING, described, fields
from llmserve.api.state import state_of
from llmserve.metrics.board import RUNNING

router = APIRouter()


@router.get("/health")
@router.get("/health/ready", include_in_schema=False)
@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
async def ready(request: Request) -> Response:
    """200 while requests are taken; else 503 with starting, draining or engine_dead."""
    state = state_of(request)
    state.engine()
    return Response(status_code=200)


@router.get("/health/live", openapi_extra=described(fields(status=STRING)))
async def live(request: Request) -> Response:
    """200 unless the engine is gone for good."""
    state = state_of(request)
    return json_response({"status": state.phase}, status=503 if state.engine_is_dead else 200)


@router.get("/load", openapi_extra=described(fields(server_load=INTEGER)))
async def load(request: Request) -> Response:
    """Requests between admission and their last byte, of all API servers."""
    return json_response({"server_load": state_of(request).board.sum(RUNNING)})
