"""A page that draws pictures step by step: `GET /`, `GET /about` and the event stream `GET /draw`."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from anyorder.contracts import Grid, Step
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import INFERRED, PolicyConfig
from anyorder.method.sampling import SCORES, Sampling
from anyorder.orders import STATIC
from anyorder.settings import parse

FRAMES = 64
"""Pictures sent of each order, at most about; large grids are painted every few steps."""
MAX_PICTURES, MAX_ORDERS = 16, 6
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'",
    "Cache-Control": "no-cache",
}


@dataclass
class DemoConfig:
    """Serve a page on which pictures are drawn in several orders, side by side; Ctrl-C ends it."""

    pipeline: str
    """Folder of a pipeline (the stage `pipeline` writes one), or a Hugging Face hub id."""
    port: int = 8000
    """TCP port to listen on."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""

    def __post_init__(self) -> None:
        _require(0 <= self.port < 65536, f"port must lie in [0, 65535], got {self.port}")


@dataclass
class Wish:
    """What a page asks `/draw` for; the fields are the query's parameters."""

    orders: list[str] = field(default_factory=list)
    """Names of orders, each drawn side by side; the pipeline's own if none is given."""
    label: str = ""
    """Name or number of a class; empty draws without one."""
    prompt: str = ""
    """A text, for a pipeline that takes them; empty says nothing."""
    n: int = 4
    """Pictures in each order."""
    seed: int = 0
    """Of the first picture; picture i uses seed + i."""
    temperature: float = 1.0
    """Of the tokens; 0 takes the most likely one."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""

    def __post_init__(self) -> None:
        self.orders = list(dict.fromkeys(self.orders))
        _require(len(self.orders) <= MAX_ORDERS, f"at most {MAX_ORDERS} orders, got {len(self.orders)}")
        _require(1 <= self.n <= MAX_PICTURES, f"n must lie in [1, {MAX_PICTURES}], got {self.n}")
        _require(0 <= self.seed < 2**31, f"seed must lie in [0, 2**31), got {self.seed}")
        _require(
            self.temperature == 0 or 0.01 <= self.temperature <= 10,
            f"temperature must be 0 or lie in [0.01, 10], got {self.temperature}",
        )
        _require(0 <= self.guidance <= 20, f"guidance must lie in [0, 20], got {self.guidance}")
        _require(
            self.guidance == 1 or self.label != "" or self.prompt != "",
            f"guidance {self.guidance:g} pulls towards a class or text: give label= or prompt=, or leave "
            "guidance at 1",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def serve(config: DemoConfig) -> None:
    """Load the pipeline and answer requests until interrupted.

    Raises:
        FileNotFoundError: no such pipeline.
        ValueError: its folder is damaged.
    """
    app = create_app(Pipeline.from_pretrained(config.pipeline))
    # A page that is still drawing must not hold up Ctrl-C.
    uvicorn.run(app, host=config.host, port=config.port, timeout_graceful_shutdown=1)


def create_app(pipe: Pipeline) -> Starlette:
    """The web application around one pipeline; one request draws at a time, others wait their turn."""
    page = files("anyorder.demo").joinpath("index.html").read_text(encoding="utf-8")
    turn = asyncio.Lock()

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=HEADERS)

    async def about(request: Request) -> Response:
        return JSONResponse(describe_pipeline(pipe))

    async def draw(request: Request) -> Response:
        try:
            steps = drawings(pipe, read_wish(request.query_params))
        except ValueError as e:
            return JSONResponse({"error": str(e)}, status_code=400)
        # iterate_in_threadpool: a cancelled request (its client is gone) asks for no further step.
        stream = _events(iterate_in_threadpool(steps), turn)
        return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)

    return Starlette(routes=[Route("/", index), Route("/about", about), Route("/draw", draw)])


async def _events(steps: AsyncIterator[dict[str, Any]], turn: asyncio.Lock) -> AsyncIterator[str]:
    if turn.locked():
        yield _event("waiting", {})
    async with turn:
        async for step in steps:
            yield _event("step", step)
    yield _event("end", {})


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


# --- what can be asked for -----------------------------------------------------------------------------


def choices(pipe: Pipeline) -> dict[str, PolicyConfig]:
    """Every order on offer by its label, the pipeline's own first."""
    names = [*SCORES, "random", *STATIC]
    names += ["class_mean"] if pipe.class_orders is not None else []
    names += ["location"] if getattr(pipe.model.config, "location", False) else []
    return {policy.label: policy for policy in (pipe.policy, *map(PolicyConfig, names))}


def describe_pipeline(pipe: Pipeline) -> dict[str, Any]:
    """Classes, grid (rows, columns), image size (height, width) in pixels, orders and limits, JSON-able."""
    grid, factor = pipe.model.grid, pipe.tokenizer.factor
    return {
        "classes": pipe.classes or [str(label) for label in range(pipe.model.config.num_classes)],
        "takes_text": pipe.vocabulary.length > 0,
        "grid": [grid.h, grid.w],
        "image": [grid.h * factor, grid.w * factor],
        "orders": [_about_order(name, policy) for name, policy in choices(pipe).items()],
        "max_pictures": MAX_PICTURES,
        "max_orders": MAX_ORDERS,
    }


def _about_order(name: str, policy: PolicyConfig) -> dict[str, Any]:
    text = _WORDS.get(policy.order) or ({**SCORES, **STATIC}[policy.order].__doc__ or "").partition("\n")[0]
    kind = "inferred" if policy.order in (*INFERRED, "location") else "given"
    return {"name": name, "kind": kind, "text": text, "token_blind": policy.token_blind}


_WORDS = {
    "random": "A random order of its own for each picture.",
    "class_mean": "The order of its class: the mean of the orders of many pictures.",
    "location": "The location head says where to go, at the price of a fixed order.",
    "information": "The position first that tells most of the others.",
}


def read_wish(query: QueryParams) -> Wish:
    """The parameters of `/draw`.

    Raises:
        ValueError: an unknown parameter, or one of the wrong type or out of range.
    """
    given: dict[str, Any] = dict(query)
    return parse(Wish, given | {"orders": query.getlist("orders")})


# --- drawing -------------------------------------------------------------------------------------------


def drawings(pipe: Pipeline, wish: Wish) -> Iterator[dict[str, Any]]:
    """One event per step of each order, in turns, so that all orders grow together.

    Every event has `order` (which of the wish), `done` and `total` (patches of each picture), `positions`,
    `tokens` and `log_prob` (nats) of the patches just revealed (n, K), `seconds` spent drawing this order
    so far, and now and then `png`: the n pictures side by side, base64, clear where nothing is drawn yet.

    Raises:
        ValueError: unknown class or order, or a text where none is taken; at once, not at the first step.
    """
    offered = choices(pipe)
    label = None if wish.label == "" else pipe.typed(wish.label)
    streams: list[Iterator[dict[str, Any]]] = []
    for name in wish.orders or [pipe.policy.label]:
        _require(name in offered, f"unknown order '{name}': choose from {'; '.join(offered)}")
        steps = pipe.stream(
            label, wish.n, offered[name], wish.guidance, wish.seed,
            sampling=Sampling(wish.temperature),
            prompt=wish.prompt or None,
        )  # fmt: skip
        streams.append(_drawing(pipe, steps, len(streams), wish.n))
    turns = itertools.zip_longest(*streams)
    return (event for turn in turns for event in turn if event is not None)


def _drawing(pipe: Pipeline, steps: Iterator[Step], order: int, n: int) -> Iterator[dict[str, Any]]:
    grid = pipe.model.grid
    tokens = torch.zeros(n, grid.n, dtype=torch.int64)
    revealed = torch.zeros(n, grid.n, dtype=torch.bool)
    done, seconds, begin = 0, 0.0, time.perf_counter()
    for step in steps:
        positions, drawn, log_prob = step.positions.cpu(), step.tokens.cpu(), step.log_prob.cpu()
        seconds += time.perf_counter() - begin
        done += positions.shape[1]
        event = {
            "order": order, "done": done, "total": step.total,
            "positions": positions.tolist(), "tokens": drawn.tolist(), "log_prob": log_prob.tolist(),
            "seconds": round(seconds, 4),
        }  # fmt: skip
        tokens.scatter_(1, positions, drawn)
        revealed.scatter_(1, positions, True)
        if done == step.total or step.index % -(-step.total // FRAMES) == 0:
            event["png"] = base64.b64encode(paint(pipe, tokens, revealed)).decode()
        yield event
        begin = time.perf_counter()


def paint(pipe: Pipeline, tokens: Tensor, revealed: Tensor) -> bytes:
    """The pictures so far, side by side in one PNG, transparent where nothing is revealed.

    Args:
        pipe: its tokenizer paints.
        tokens: (n, N) int64, raster order; ignored where nothing is revealed.
        revealed: (n, N) bool, at least one in each row.
    """
    grid = pipe.model.grid
    pictures = pipe.decode(tokens.gather(1, nearest_revealed(revealed, grid)))
    width, height = pictures[0].size
    strip = Image.new("RGBA", (width * len(pictures), height))
    for i, (picture, known) in enumerate(zip(pictures, revealed, strict=True)):
        mask = Image.fromarray(known.reshape(grid.h, grid.w).byte().mul(255).numpy())
        strip.paste(picture, (i * width, 0), mask.resize(picture.size, Image.Resampling.NEAREST))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


def nearest_revealed(revealed: Tensor, grid: Grid) -> Tensor:
    """For each position the nearest revealed one, itself if it is, (n, N) int64 from (n, N) bool.

    A decoder looks at neighbours too: lending a patch's token to the blank ones around it shows the patch
    in its own surroundings, and not beside some arbitrary token.
    """
    at = grid.coordinates()
    gap = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")
    return gap.expand(len(revealed), -1, -1).masked_fill(~revealed[:, None], torch.inf).argmin(-1)
