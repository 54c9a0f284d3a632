"""The FastAPI application: routes, errors in one shape, the API key. Starts nothing."""

from __future__ import annotations

import hmac

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.launch.http import admin, chat, completions, generate, info, not_built, profile, responses, tokenize
from moesaic.launch.http.client import RankClient
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import ApiError, handle_api_error, handle_crash, handle_http_exception
from moesaic.launch.http.services import make_services
from moesaic.launch.http.tokenizer import Tokenizer

# As in SGLang: probes and scrapers carry no key.
OPEN_PATHS = ("/health", "/ready", "/metrics")


class ApiKeyMiddleware:
    """Plain ASGI: a wrapper of the response would hide the client's leaving from the endpoints."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "missing or wrong API key: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or scope["path"].startswith(OPEN_PATHS):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        # Takes the same time wherever the first difference is.
        return hmac.compare_digest(given, self._expected)


def make_app(config: HttpConfig, client: RankClient, tokenizer: Tokenizer | None) -> FastAPI:
    """The whole server as an ASGI application. `tokenizer` None: token ids only."""
    services = make_services(config, client, tokenizer)
    app = FastAPI(title="moesaic", version=config.version, openapi_url=None)
    for module in (admin, profile, info, generate, chat, completions, responses, tokenize):
        app.include_router(module.make_router(services))
    app.include_router(not_built.make_router())
    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(Exception, handle_crash)
    if config.api_key:
        app.add_middleware(ApiKeyMiddleware, api_key=config.api_key)
    return app
