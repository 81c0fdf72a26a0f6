"""What the page's server refuses, and the headers of every answer: no other web site may use it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyorder.demo.line import one_line

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy must pass on each event at once
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_NAME = re.compile(r"\*|(\*\.)?[\w.-]+|\[?(?=.*:.*:)[\da-f:.]+\]?", re.ASCII | re.IGNORECASE)


def is_host(name: str) -> bool:
    """Whether it is a host name or address without port; `*` is any, `*.name` any below it."""
    return _NAME.fullmatch(name) is not None


def bracketed(host: str) -> str:
    """An address as in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def guards(hosts: Sequence[str]) -> list[Middleware]:
    """Headers for every answer; 400 for a Host header that is neither this machine nor one of `hosts`.

    A foreign name there is that of a web site which was pointed to this address (DNS rebinding).
    """
    names = [bracketed(host) for host in (*LOCAL_HOSTS, *hosts)]
    return [
        Middleware(_with_headers),
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
    ]


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


def refusal(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says what is wrong, as the page shows it."""
    return JSONResponse({"error": error}, status, headers)


async def failed(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that raised an error; one short line in the log."""
    logging.getLogger(__name__).error("%s failed: %s", request.url.path[:100], one_line(error))
    return refusal(500, f"The server failed: {one_line(error)}", HEADERS)
