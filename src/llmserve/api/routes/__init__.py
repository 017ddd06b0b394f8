# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One file a route. Routes are blind to each other; what they share lies in the folder above."""

from fastapi import APIRouter

from llmserve.api.routes import health, metrics, models, tokenize, version
from llmserve.api.routes.chat.handler import router as chat_router
from llmserve.api.routes.completions.handler import router as completions_router

ROUTERS: tuple[APIRouter, ...] = (
    chat_router,
    completions_router,
    models.router,
    tokenize.router,
    health.router,
    metrics.router,
    version.router,
)
