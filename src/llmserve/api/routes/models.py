# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /v1/models and /v1/models/{id}; an id may have slashes."""

from typing import Any

from fastapi import APIRouter, Request, Response

from llmserve.api.answer import json_response
from llmserve.api.openapi import MODEL, MODELS, described
from llmserve.api.state import AppState, state_of

router = APIRouter()


@router.get("/v1/models", openapi_extra=described(MODELS))
async def list_models(request: Request) -> Response:
    """Every name that requests may use."""
    state = state_of(request)
    state.engine()
    return json_response({"object": "list", "data": [_card(state, name) for name in state.names]})


@router.get("/v1/models/{model:path}", openapi_extra=described(MODEL))
async def get_model(request: Request, model: str) -> Response:
    """One of them; 404 for others."""
    state = state_of(request)
    state.engine()
    return json_response(_card(state, state.resolve_model(model)))


def _card(state: AppState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created,
        "owned_by": "llmserve",
        "root": state.names[0],
        "parent": None,
        "max_model_len": state.engine().model.max_model_len,
        "permission": [],
    }
