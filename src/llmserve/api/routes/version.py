# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /version."""

from fastapi import APIRouter, Response

from llmserve import __version__
from llmserve.api.answer import json_response
from llmserve.api.openapi import STRING, described, fields

router = APIRouter()


@router.get("/version", openapi_extra=described(fields(version=STRING)))
async def version() -> Response:
    """The version of this server."""
    return json_response({"version": __version__})
