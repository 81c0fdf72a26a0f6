"""A page that shows images being generated: `GET /`, `GET /about` and the event stream `GET /draw`."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
import uvicorn
from PIL import Image
from starlette import applications, requests, responses, routing
from torch import Tensor

from anyorder.contracts import Grid, Step
from anyorder.demo import guard, line
from anyorder.inference.pipeline import Pipeline
from anyorder.method import sampling
from anyorder.method.policy_config import PolicyConfig
from anyorder.orders import STATIC
from anyorder.settings import parse

FRAMES = 64
"""About how many PNGs are sent of each order at most; large grids are painted every few steps."""
MAX_IMAGES, MAX_ORDERS = 16, 6


@dataclass
class DemoConfig:
    """Serve a page that generates images in several orders, side by side; Ctrl-C ends it."""

    pipeline: str
    """Folder of a pipeline (the stage `pipeline` writes one), the name of one that comes with the package
    (fashion32), or a Hugging Face hub id."""
    port: int = 8000
    """TCP port to listen on, 0 to 65535; by default 8000."""
    host: str = "127.0.0.1"
    """Address to listen on; by default 127.0.0.1, this machine only. 0.0.0.0 lets other machines in, under
    the names that `allow_host` lists."""
    allow_host: list[str] = field(default_factory=list)
    """Further names or addresses under which browsers may ask for the page, without port: for example
    lab.example.org,192.168.1.5. By default localhost, 127.0.0.1, [::1] and `host`; * allows every name."""

    def __post_init__(self) -> None:
        _require(0 <= self.port < 65536, f"port must lie in [0, 65535], got {self.port}")
        wrong = [name for name in self.allow_host if not guard.is_host(name)]
        _require(not wrong, f"allow_host takes names such as lab.example.org, without port, got {wrong}")


@dataclass
class GenerateRequest:
    """What a page asks `/draw` for; the fields are the query's parameters."""

    orders: list[str] = field(default_factory=list)
    """Names of orders, side by side; by default the pipeline's policy."""
    label: str = ""
    """Name or number of a class; empty (default) generates without one."""
    prompt: str = ""
    """A text, for a pipeline that was trained with captions; empty (default) is none."""
    n: int = 4
    """Images in each order; by default 4."""
    seed: int = 0
    """Image i is generated from seed + i; by default 0."""
    temperature: float = 1.0
    """Temperature of the tokens; 0 takes the most likely one."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 (default) is none."""

    def __post_init__(self) -> None:
        self.orders = list(dict.fromkeys(self.orders))
        heat, scale, asked = self.temperature, self.guidance, self.label != "" or self.prompt != ""
        _require(len(self.orders) <= MAX_ORDERS, f"at most {MAX_ORDERS} orders, got {len(self.orders)}")
        _require(1 <= self.n <= MAX_IMAGES, f"n must lie in [1, {MAX_IMAGES}], got {self.n}")
        _require(0 <= self.seed < 2**31, f"seed must lie in [0, 2**31), got {self.seed}")
        _require(heat == 0 or 0.01 <= heat <= 10, f"temperature must be 0 or lie in [0.01, 10], got {heat}")
        _require(0 <= scale <= 20, f"guidance must lie in [0, 20], got {scale}")
        pulls = f"guidance {scale:g} pulls towards a class or text"
        _require(scale == 1 or asked, f"{pulls}: give label= or prompt=, or leave guidance at 1")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def serve(config: DemoConfig) -> None:
    """Load the pipeline and answer requests until interrupted.

    Raises:
        FileNotFoundError: no such pipeline.
        OSError: the address cannot be listened on.
        ValueError: its folder is damaged.
    """
    app = create_app(Pipeline.from_pretrained(config.pipeline), [config.host, *config.allow_host])
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # A page that is still waiting for images must not hold up Ctrl-C. What uvicorn would log are addresses
    # of any length and tracebacks; `line` and `guard.failed` log one short line instead.
    settings = uvicorn.Config(
        app, timeout_graceful_shutdown=1, lifespan="off", access_log=False, log_config=None,
        log_level="critical",
    )  # fmt: skip
    with socket.create_server((config.host, config.port), family=family) as listener:
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: close connections that were cut off and stay full
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2000 * line.PATIENCE)
        address = f"http://{guard.bracketed(config.host)}:{listener.getsockname()[1]}"
        print(f"the page is at {address}, Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])


def create_app(pipe: Pipeline, hosts: Sequence[str] = ()) -> applications.Starlette:
    """The web application around one pipeline; one request is served at a time, others wait their turn.

    Args:
        pipe: generates the images.
        hosts: names under which browsers may ask for the page, besides localhost and its addresses.
    """
    page = files("anyorder.demo").joinpath("index.html").read_text(encoding="utf-8")
    waiting = line.Line()

    async def index(request: requests.Request) -> responses.Response:
        return responses.HTMLResponse(page)

    async def about(request: requests.Request) -> responses.Response:
        return responses.JSONResponse(describe_pipeline(pipe))

    async def draw(request: requests.Request) -> responses.Response:
        if guard.from_elsewhere(request.headers):
            return guard.refusal(403, "Another web site may not start work here: open the page itself.")
        if waiting.open >= line.MAX_REQUESTS:
            busy = f"The server is busy, {waiting.open} requests are open: try again in half a minute."
            return guard.refusal(503, busy, {"Retry-After": "30"})
        try:
            query: dict[str, Any] = {**request.query_params, "orders": request.query_params.getlist("orders")}
            return line.EventStream(generate_events(pipe, parse(GenerateRequest, query)), waiting)
        except ValueError as e:
            return guard.refusal(400, str(e))

    return applications.Starlette(
        routes=[routing.Route(path, get) for path, get in (("/", index), ("/about", about), ("/draw", draw))],
        exception_handlers={Exception: guard.failed},
        middleware=guard.guards(hosts),
    )


def choices(pipe: Pipeline) -> dict[str, PolicyConfig]:
    """Every order on offer by its label, the pipeline's policy first."""
    names = [*sampling.SCORES, "random", *STATIC]
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
        "max_images": MAX_IMAGES,
        "max_orders": MAX_ORDERS,
    }


def _about_order(name: str, policy: PolicyConfig) -> dict[str, Any]:
    found: dict[str, Any] = {**sampling.SCORES, **STATIC}
    text = _DESCRIPTIONS.get(policy.order) or getattr(found.get(policy.order), "__doc__", "") or ""
    kind = "inferred" if policy.decided else "given"
    return {"name": name, "kind": kind, "text": text.partition("\n")[0], "token_blind": policy.token_blind}


_DESCRIPTIONS = {
    "random": "Another random order for each image.",
    "class_mean": "One order for each class: the mean of the orders of many images.",
    "location": "The location head decides where to go, at the cost of a fixed order.",
    "information": "First the position whose token says most about the others.",
}


# --- generation ----------------------------------------------------------------------------------------


def generate_events(pipe: Pipeline, asked: GenerateRequest) -> Iterator[dict[str, Any]]:
    """One event per step of each order, in turns, so that all orders grow together.

    Every event has `order` (index into `asked.orders`), `done` and `total` (patches of each image),
    `positions`, `tokens` and `log_prob` (nats) of the patches just revealed (n, K), `seconds` spent on this
    order so far, and now and then `png`: the n images side by side, base64, transparent where nothing is
    revealed yet.

    Raises:
        ValueError: unknown class or order, or a text where none is taken; at once, not at the first step.
    """
    offered = choices(pipe)
    label = None if asked.label == "" else pipe.typed(asked.label)
    streams: list[Iterator[dict[str, Any]]] = []
    for name in asked.orders or [pipe.policy.label]:
        _require(name in offered, f"unknown order '{name}': choose from {'; '.join(offered)}")
        steps = pipe.stream(
            label, asked.n, offered[name], asked.guidance, asked.seed,
            sampling=sampling.Sampling(asked.temperature),
            prompt=asked.prompt or None,
        )  # fmt: skip
        streams.append(_events_of_order(pipe, steps, len(streams), asked.n))
    turns = itertools.zip_longest(*streams)
    return (event for turn in turns for event in turn if event is not None)


def _events_of_order(pipe: Pipeline, steps: Iterator[Step], order: int, n: int) -> Iterator[dict[str, Any]]:
    grid = pipe.model.grid
    tokens = torch.zeros(n, grid.n, dtype=torch.int64)
    revealed = torch.zeros(n, grid.n, dtype=torch.bool)
    seconds, begin = 0.0, time.perf_counter()
    for step in steps:
        positions, sampled, log_prob = step.positions.cpu(), step.tokens.cpu(), step.log_prob.cpu()
        seconds += time.perf_counter() - begin
        tokens.scatter_(1, positions, sampled)
        revealed.scatter_(1, positions, True)
        done = int(revealed.sum(1).min())  # images may reveal different numbers at a step
        event = {
            "order": order, "done": done, "total": step.total,
            "positions": positions.tolist(), "tokens": sampled.tolist(), "log_prob": log_prob.tolist(),
            "seconds": round(seconds, 4),
        }  # fmt: skip
        if done == step.total or step.index % -(-step.total // FRAMES) == 0:
            event["png"] = base64.b64encode(paint(pipe, tokens, revealed)).decode()
        yield event
        begin = time.perf_counter()


def paint(pipe: Pipeline, tokens: Tensor, revealed: Tensor) -> bytes:
    """The images so far, side by side in one PNG, transparent where nothing is revealed.

    Args:
        pipe: its tokenizer paints.
        tokens: (n, N) int64, raster order; ignored where nothing is revealed.
        revealed: (n, N) bool, at least one in each row.
    """
    grid = pipe.model.grid
    images = pipe.decode(tokens.gather(1, nearest_revealed(revealed, grid)))
    width, height = images[0].size
    strip = Image.new("RGBA", (width * len(images), height))
    for i, (image, known) in enumerate(zip(images, revealed, strict=True)):
        mask = Image.fromarray(known.reshape(grid.h, grid.w).byte().mul(255).numpy())
        strip.paste(image, (i * width, 0), mask.resize(image.size, Image.Resampling.NEAREST))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


def nearest_revealed(revealed: Tensor, grid: Grid) -> Tensor:
    """For each position the nearest revealed one, itself if it is, (n, N) int64 from (n, N) bool.

    A decoder sees neighbouring patches, too: blank ones get the token of the nearest revealed patch, so that
    no arbitrary token changes how that patch looks.
    """
    at = grid.coordinates()
    gap = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")
    return gap.expand(len(revealed), -1, -1).masked_fill(~revealed[:, None], torch.inf).argmin(-1)
