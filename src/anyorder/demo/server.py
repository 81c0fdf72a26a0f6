"""The server of a page where images are generated and completed.

`/draw` (GET, or POST for images) and `/animation` are event streams; `/about` and `/code` answer at once.
"""

import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import uvicorn
from starlette import applications, requests, responses, routing
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from anyorder.contracts import require
from anyorder.demo import generation, guard, line
from anyorder.demo.snippets import snippets
from anyorder.inference.pipeline import Pipeline
from anyorder.settings import parse

PAGE = {
    "index.html": "text/html", "style.css": "text/css",
    **dict.fromkeys(("app.js", "editor.js", "player.js", "share.js", "stream.js"), "text/javascript"),
}  # fmt: skip
"""The files of the page and their types."""


@dataclass
class DemoConfig:
    """Serve a page that generates images in several orders, side by side; Ctrl-C ends it."""

    pipeline: str
    """Folder of a pipeline (the stage `pipeline` writes one), the name of one that comes with the package
    (fashion32, fashion64, emoji64), or a Hugging Face hub id."""
    port: int = 8000
    """TCP port to listen on, 0 to 65535; by default 8000."""
    host: str = "127.0.0.1"
    """Address to listen on; by default 127.0.0.1, this machine only. 0.0.0.0 lets other machines in, under
    the names that `allow_host` lists; connections that send nothing are not limited, so only trusted ones."""
    allow_host: list[str] = field(default_factory=list)
    """Further names or addresses under which browsers may ask for the page, without port: for example
    lab.example.org,192.168.1.5. By default localhost, 127.0.0.1, [::1] and `host`; * allows every name."""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"port must lie in [0, 65535], got {self.port}")
        wrong = [name for name in self.allow_host if not guard.HOST.fullmatch(name)]
        require(not wrong, f"allow_host takes names such as lab.example.org, without port, got {wrong}")


def serve(config: DemoConfig) -> None:
    """Load the pipeline and answer requests until interrupted.

    Raises:
        FileNotFoundError: no such pipeline.
        OSError: the address cannot be listened on.
        ValueError: its folder is damaged.
    """
    hosts = [config.host, *config.allow_host]
    app = create_app(Pipeline.from_pretrained(config.pipeline), hosts, config.pipeline)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # A page that is still waiting for images must not hold up Ctrl-C. What uvicorn would log are addresses
    # of any length and tracebacks; `line` and `guard.failed` log one short line instead.
    settings = uvicorn.Config(
        app, timeout_graceful_shutdown=1, lifespan="off", access_log=False, log_config=None,
        log_level="critical", limit_concurrency=4 * line.MAX_REQUESTS,
    )  # fmt: skip
    with socket.create_server((config.host, config.port), family=family) as listener:
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: close connections that were cut off and stay full
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * line.PATIENCE)
        address = f"http://{guard.bracketed(config.host)}:{listener.getsockname()[1]}"
        print(f"the page is at {address}, Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


def create_app(pipe: Pipeline, hosts: Sequence[str] = (), name: str = "PIPELINE") -> applications.Starlette:
    """The web application around one pipeline; one request is served at a time, others wait their turn.

    Args:
        pipe: generates the images.
        hosts: names under which browsers may ask for the page, besides localhost and its addresses.
        name: of the pipeline, as `Pipeline.from_pretrained` takes it.
    """
    waiting = line.Line()

    async def about(request: requests.Request) -> responses.Response:
        return guard.answer(generation.describe_pipeline(pipe, name))

    async def code(request: requests.Request) -> responses.Response:
        asked = await understood(generation.GenerateRequest, request)
        return guard.answer(snippets(pipe, name, asked))

    async def draw(request: requests.Request) -> responses.Response:
        return await started(generation.generate_events, generation.GenerateRequest, request)

    async def animation(request: requests.Request) -> responses.Response:
        return await started(generation.animation_events, generation.AnimationRequest, request)

    async def understood(kind: type[Any], request: requests.Request) -> Any:
        settings = await guard.read_settings(request)
        if request.method == "GET":
            return parse(kind, settings)
        # Large ones take part of a second, in which the others must be served.
        return await run_in_threadpool(parse, kind, settings)

    async def started(
        events: Callable[..., Iterator[generation.Event]], kind: type[Any], request: requests.Request
    ) -> responses.Response:
        asked = await understood(kind, request)  # others may begin meanwhile: count afterwards
        if waiting.open < line.MAX_REQUESTS:
            return line.EventStream(events(pipe, asked), waiting)
        busy = f"The server is busy, {waiting.open} requests are open: try again in half a minute."
        raise HTTPException(503, busy, {"Retry-After": "30"})

    return applications.Starlette(
        routes=[
            routing.Route("/", _file("index.html")),
            *(routing.Route(f"/{name}", _file(name)) for name in PAGE),
            routing.Route("/about", about),
            routing.Route("/draw", draw, methods=["GET", "POST"]),
            *(routing.Route(f"/{f.__name__}", f, methods=["POST"]) for f in (code, animation)),
        ],
        exception_handlers={ValueError: guard.wrong, HTTPException: guard.refused, Exception: guard.failed},
        middleware=guard.guards(hosts),
    )


def _file(name: str) -> Callable[[requests.Request], Awaitable[responses.Response]]:
    """Answers with a file of the page."""
    text = files("anyorder.demo").joinpath(name).read_text(encoding="utf-8")

    async def answer(request: requests.Request) -> responses.Response:
        return responses.Response(text, media_type=PAGE[name])

    return answer
