"""What the page's server refuses, and the headers of every answer: no other web site may use it."""

import asyncio
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyorder.demo.line import PATIENCE, one_line

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy must pass on each event at once
}
MAX_BODY = 6 * 2**20
"""Bytes of a request."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
HOST = re.compile(r"\*|(\*\.)?[\w.-]+|\[?(?=.*:.*:)[\da-f:.]+\]?", re.ASCII | re.IGNORECASE)
"""A host name or address without port; `*` is any, `*.name` any below it."""


def bracketed(host: str) -> str:
    """An address as in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def guards(hosts: Sequence[str]) -> list[Middleware]:
    """Headers for every answer; 400 for a Host header that is neither this machine nor one of `hosts`.

    A foreign name there is that of a web site which was pointed to this address (DNS rebinding).
    """
    names = [bracketed(host) for host in (*LOCAL_HOSTS, *hosts)]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    return [Middleware(_with_headers), trusted]


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, send_more)

    return answer


def from_elsewhere(headers: Headers) -> bool:
    """Whether a page of another site asks; browsers say so, by these headers in turn."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    sources = [headers[name] for name in ("origin", "referer") if name in headers]
    return any(source.split("/")[2:3] != [headers["host"]] for source in sources)


async def read_settings(request: Request) -> dict[str, Any]:
    """The settings of a request that starts work: the query's parameters, or the JSON object in its body.

    Raises:
        HTTPException: it comes from another site, or its body is too large, too slow or no JSON object.
    """
    if from_elsewhere(request.headers):
        raise HTTPException(403, "Another web site may not start work here: open the page itself.")
    if request.method == "GET":
        return {**request.query_params, "orders": request.query_params.getlist("orders")}
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "Send settings as application/json.")
    try:
        async with asyncio.timeout(PATIENCE):
            body = await _body(request)
        settings = await run_in_threadpool(json.loads, body)
    except TimeoutError as e:
        raise HTTPException(408, f"The request took more than {PATIENCE} s to arrive: send it again.") from e
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise HTTPException(400, "The body of the request must be a JSON object of settings.")
    return settings


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            text = f"The request has more than {MAX_BODY >> 20} MiB: send a smaller image."
            raise HTTPException(413, text, {"Connection": "close"})
    return bytes(body)


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: names of files, and what is made of them, may be no Unicode."""
    return Response(json.dumps(content), status, headers, "application/json")


async def refused(request: Request, error: Exception) -> Response:
    """The answer to a request that is refused, as the page shows it."""
    assert isinstance(error, HTTPException)
    return answer({"error": error.detail}, error.status_code, error.headers)


async def wrong(request: Request, error: Exception) -> Response:
    """The answer to settings that make no sense."""
    return answer({"error": str(error)}, 400)


async def failed(request: Request, error: Exception) -> Response:
    """The answer to a request that raised an error; one short line in the log."""
    logging.getLogger(__name__).error("%s failed: %s", request.url.path[:100], one_line(error))
    return answer({"error": f"The server failed: {one_line(error)}"}, 500, HEADERS)
