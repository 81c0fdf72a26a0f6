"""What the page asks for and gets: orders on offer, and the events of images that are being generated."""

import base64
import io
import itertools
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyorder.contracts import Grid, Step, require
from anyorder.data.classes import display_name
from anyorder.data.images import load_image, load_mask
from anyorder.inference import figures
from anyorder.inference.device import autocast_like
from anyorder.inference.inpainting import Unfinished
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import SCORES, Sampling
from anyorder.orders import STATIC

Event = dict[str, Any]
FRAMES = 64
"""About how many PNGs are sent of each order at most; large grids are painted every few steps."""
MAX_IMAGES, MAX_ORDERS = 16, 6
GROWTH = 4
"""How many times as many patches as a training image an image to complete may have, border included."""


@dataclass
class GenerateRequest:
    """What a page asks `/draw` for: the parameters of the query, or the body."""

    orders: list[str] = field(default_factory=list)
    """Names of orders, side by side; by default the pipeline's policy."""
    class_labels: str = ""
    """Name or number of a class; empty (default) generates without one."""
    prompt: str = ""
    """A text, for a pipeline that was trained with captions; empty (default) is none."""
    num_images: int = 4
    """Images in each order; by default 4."""
    seed: int = 0
    """Image i is generated from seed + i; by default 0."""
    temperature: float | None = None
    """Temperature of the tokens; 0 takes the most likely one; by default what the pipeline says."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 is none; by default what the pipeline says."""
    image: str = ""
    """An image file in base64, parts of which are generated anew; empty (default) generates whole images."""
    mask: str = ""
    """An image file in base64, of the size of the image: white is generated, black is kept."""
    keep: float | None = None
    """Instead of a mask: share of patches to keep, in [0, 1), chosen at random."""

    def __post_init__(self) -> None:
        self.orders = list(dict.fromkeys(self.orders))
        heat, scale = (1 if n is None else n for n in (self.temperature, self.guidance_scale))
        asked = self.class_labels != "" or self.prompt != ""
        require(len(self.orders) <= MAX_ORDERS, f"at most {MAX_ORDERS} orders, got {len(self.orders)}")
        text = f"num_images must lie in [1, {MAX_IMAGES}], got {self.num_images}"
        require(1 <= self.num_images <= MAX_IMAGES, text)
        require(0 <= self.seed < 2**31, f"seed must lie in [0, 2**31), got {self.seed}")
        require(heat == 0 or 0.01 <= heat <= 10, f"temperature must be 0 or lie in [0.01, 10], got {heat}")
        require(0 <= scale <= 20, f"guidance_scale must lie in [0, 20], got {scale}")
        pulls = f"guidance_scale={scale:g} pulls towards a class or text"
        require(scale == 1 or asked, f"{pulls}: give class_labels= or prompt=, or leave it at 1")
        unpaired = any("\ud800" <= letter <= "\udfff" for letter in self.prompt)
        require(not unpaired, "prompt holds half of a character (a lone surrogate): leave it out")
        require(self.keep is None or 0 <= self.keep < 1, f"keep must be a share in [0, 1), got {self.keep}")
        part = self.mask != "" or self.keep is not None
        require(self.image != "" or not part, "mask and keep say what of an image is generated: give image=")


# --- what is on offer ----------------------------------------------------------------------------------


def choices(pipe: Pipeline) -> dict[str, PolicyConfig]:
    """Every order on offer by its label: the pipeline's policy, what else it is good at, experiments.

    Where somebody has looked what it is good at, other scores than its own, which may leave images blank, are
    not among the experiments.
    """
    names = [*pipe.good_orders, *([] if pipe.good_orders else SCORES), "random", *STATIC]
    names += ["class_mean"] if pipe.class_orders is not None else []
    names += ["location"] if getattr((pipe.scorer or pipe.model).config, "location", False) else []
    return {policy.label: policy for policy in (pipe.policy, *map(PolicyConfig, names))}


def describe_pipeline(pipe: Pipeline, name: str = "") -> dict[str, Any]:
    """What the page shows and offers, JSON-able; sizes are (height, width) in pixels, grids in patches."""
    grid, factor = pipe.model.grid, pipe.tokenizer.factor
    classes = [*map(display_name, pipe.classes)] or [str(label) for label in range(pipe.model.num_classes)]
    return {
        "name": name,
        "pipeline": repr(pipe),
        "classes": classes,
        "example_class": display_name(pipe.example_class or "") or next(iter(classes), ""),
        "guidance": pipe.guidance.scale,
        "temperature": pipe.sampling.temperature,
        "takes_text": pipe.vocabulary.length > 0,
        "grid": [grid.h, grid.w],
        "image": [grid.h * factor, grid.w * factor],
        "orders": [_about_order(pipe, label, policy) for label, policy in choices(pipe).items()],
        "completes": "random" in _good(pipe),
        "max_images": MAX_IMAGES,
        "max_orders": MAX_ORDERS,
        "max_patches": GROWTH * grid.n,
    }


def _good(pipe: Pipeline) -> list[str]:
    return list(dict.fromkeys([pipe.policy.label, *pipe.good_orders]))


def _about_order(pipe: Pipeline, name: str, policy: PolicyConfig) -> dict[str, Any]:
    found: dict[str, Any] = {**SCORES, **STATIC}
    text = _DESCRIPTIONS.get(policy.order) or getattr(found.get(policy.order), "__doc__", "") or ""
    kind, good = "inferred" if policy.decided else "given", name in _good(pipe)
    made_for = ", ".join(_good(pipe)).replace("_", " ")
    why = f"An experiment: this model is made for {made_for}, and may be poor at other orders."
    if not policy.token_blind:
        why += " It looks at sampled tokens before it chooses a position: likely tokens appear too often."
    return {
        "name": name, "kind": kind, "text": text.partition("\n")[0], "token_blind": policy.token_blind,
        "good": good, "why": "" if good else why,
    }  # fmt: skip


_DESCRIPTIONS = {
    "random": "Another random order for each image.",
    "class_mean": "One order for each class: the mean of the orders of many images.",
    "location": "The location head decides where to go, at the cost of a fixed order.",
    "information": "First the position whose token says most about the others.",
}


def chosen(pipe: Pipeline, asked: GenerateRequest) -> list[PolicyConfig]:
    """The orders that a request names; a ValueError lists those on offer."""
    offered = choices(pipe)
    for name in asked.orders:
        require(name in offered, f"unknown order '{name}': choose from {'; '.join(offered)}")
    return [offered[name] for name in asked.orders or [pipe.policy.label]]


def guidance_scale(pipe: Pipeline, asked: GenerateRequest) -> float | None:
    """What differs from the pipeline's own guidance; None: nothing."""
    return None if asked.guidance_scale == pipe.guidance.scale else asked.guidance_scale


def sampling_settings(pipe: Pipeline, asked: GenerateRequest) -> dict[str, Any]:
    """The fields of `sampling` where the temperature is not the pipeline's own; empty: nothing differs."""
    if asked.temperature in (None, pipe.sampling.temperature):
        return {}
    own = asdict(pipe.sampling).items() if asked.temperature else []
    return {name: v for name, v in own if v != getattr(Sampling, name)} | {"temperature": asked.temperature}


# --- generation ----------------------------------------------------------------------------------------


def generate_events(pipe: Pipeline, asked: GenerateRequest) -> Iterator[Event]:
    """One event per step of each order, in turns, so that all orders grow together.

    Every event has `order` (index into `asked.orders`), `done` and `total` (patches to generate of each
    image; the fewest of any that are done), `positions`, `tokens` and `log_prob` (nats) of the patches just
    revealed, n rows, `seconds` spent on this order so far, and now and then `png`: the n images side by side,
    base64, transparent where nothing is revealed yet.

    Raises:
        ValueError: unknown class or order, a text where none is taken, an image or mask that cannot be read
            or does not fit; at once, not at the first step.
    """
    given = _read_image(pipe, asked)
    steps = (_steps(pipe, asked, policy, given) for policy in chosen(pipe, asked))
    streams = [_events_of_order(pipe, each, order) for order, each in enumerate(steps)]
    return (event for turn in itertools.zip_longest(*streams) for event in turn if event is not None)


def _read_image(pipe: Pipeline, asked: GenerateRequest) -> dict[str, Any]:
    """Image, mask and keep as of `Pipeline.stream_completion`; nothing for whole images."""
    if not asked.image:
        return {}
    pixels = GROWTH * pipe.model.grid.n * pipe.tokenizer.factor**2
    image = load_image(_file("image", asked.image), max_pixels=pixels)
    mask = load_mask(_file("mask", asked.mask), max_pixels=pixels) if asked.mask else None
    return {"image": image, "mask": mask, "keep": asked.keep}


def _file(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as e:
        raise ValueError(f"{name} must be an image file in base64: {e}") from e


def _steps(
    pipe: Pipeline, asked: GenerateRequest, policy: PolicyConfig, given: dict[str, Any]
) -> Iterator[tuple[Unfinished, Step]]:
    label = None if asked.class_labels == "" else pipe.typed(asked.class_labels)
    how: dict[str, Any] = {"sampling": sampling_settings(pipe, asked) or None, "prompt": asked.prompt or None}
    request = (label, asked.num_images, policy, guidance_scale(pipe, asked), asked.seed)
    if given:
        return pipe.stream_completion(given["image"], given["mask"], *request, keep=given["keep"], **how)
    grid = pipe.model.grid
    unknown = torch.zeros(asked.num_images, grid.n, dtype=torch.bool, device=pipe.device)
    blank = Unfinished(unknown.long(), unknown, grid)
    return ((blank, step) for step in pipe.stream(*request, **how))


def _events_of_order(pipe: Pipeline, steps: Iterator[tuple[Unfinished, Step]], order: int) -> Iterator[Event]:
    seconds, begin = 0.0, time.perf_counter()
    for begun, step in steps:
        if step.index == 0:
            tokens, revealed = begun.tokens.cpu().clone(), begun.known.cpu().clone()
        positions, sampled, log_prob = step.positions.cpu(), step.tokens.cpu(), step.log_prob.cpu()
        seconds += time.perf_counter() - begin
        tokens.scatter_(1, positions, sampled)
        revealed.scatter_(1, positions, True)
        # Images may reveal different numbers at a step.
        done = step.total - int((~revealed).sum(1).max())
        valid = torch.ones_like(positions, dtype=torch.bool) if step.valid is None else step.valid.cpu()
        columns = {"positions": positions, "tokens": sampled, "log_prob": log_prob}
        event = {
            "order": order, "done": done, "total": step.total, "seconds": round(seconds, 4),
            **{name: [row[some].tolist() for row, some in zip(rows, valid, strict=True)]
               for name, rows in columns.items()},
        }  # fmt: skip
        if done == step.total or step.index % -(-step.total // FRAMES) == 0:
            event["png"] = base64.b64encode(paint(pipe, begun, tokens, revealed)).decode()
        yield event
        begin = time.perf_counter()


def paint(pipe: Pipeline, begun: Unfinished, tokens: Tensor, revealed: Tensor) -> bytes:
    """The images so far, side by side in one PNG, transparent where nothing is revealed.

    Args:
        pipe: its tokenizer paints.
        begun: what was known before.
        tokens: (n, N) int64, raster order; ignored where nothing is revealed.
        revealed: (n, N) bool, at least one in each row.
    """
    grid, factor = begun.grid, pipe.tokenizer.factor
    filled = tokens.gather(1, nearest_revealed(revealed, grid))
    with autocast_like(pipe.model):
        images = begun.finish(pipe.tokenizer, filled.to(begun.tokens.device)).cpu()
    patches = revealed.view(-1, 1, grid.h, grid.w)
    shown = patches.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if begun.kept is not None:
        shown = shown | begun.kept.cpu()
    layers = torch.cat([images * shown, shown.byte() * 255], 1)
    strip = layers.permute(2, 0, 3, 1).flatten(1, 2)
    Image.fromarray(strip.numpy()).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def nearest_revealed(revealed: Tensor, grid: Grid) -> Tensor:
    """For each position the nearest revealed one, itself if it is, (n, N) int64 from (n, N) bool.

    A decoder sees neighbouring patches, too: blank ones get the token of the nearest revealed patch, so that
    no arbitrary token changes how that patch looks.
    """
    at = grid.coordinates()
    gap = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")
    return gap.expand(len(revealed), -1, -1).masked_fill(~revealed[:, None], torch.inf).argmin(-1)


# --- animations ----------------------------------------------------------------------------------------


@dataclass
class AnimationRequest:
    """What a page asks `/animation` for: finished images, as an animation in their order."""

    image: str
    """The images side by side, an image file in base64."""
    order: list[list[int]]
    """The order of each image; what was given comes first."""
    grid: tuple[int, int]
    """Rows and columns of patches of each image."""
    known: int = 0
    """How many patches of each image were given; by default none."""
    format: str = "webp"
    """webp (default) or gif."""

    def __post_init__(self) -> None:
        require(1 <= len(self.order) <= MAX_IMAGES, f"1 to {MAX_IMAGES} orders, got {len(self.order)}")
        require(min(self.grid) >= 1, f"grid must be rows and columns of patches, got {self.grid}")
        patches = math.prod(self.grid)
        require(0 <= self.known < patches, f"known must lie in [0, {patches}), got {self.known}")
        require(self.format in ("webp", "gif"), f"format must be webp or gif, got '{self.format}'")


def animation_events(pipe: Pipeline, asked: AnimationRequest) -> Iterator[Event]:
    """One event: `file`, an animation in base64.

    Raises:
        ValueError: an image that cannot be read, or orders that do not fit; at once.
    """
    n, (h, w) = len(asked.order), asked.grid
    text = f"orders must have a row of {h * w} patches for each image"
    require(all(len(row) == h * w for row in asked.order), text)
    most = n * GROWTH * pipe.model.grid.n * pipe.tokenizer.factor**2
    strip = load_image(_file("image", asked.image), max_pixels=most)
    fits = strip.shape[0] % h == 0 and strip.shape[1] % (n * w) == 0
    require(fits, f"the image has {strip.shape[:2]} pixels, which are no {n} images of {h} x {w} patches")
    images = np.stack(np.split(strip, n, axis=1))
    order, grid = np.array(asked.order), Grid(h, w)
    figures.ranks(order, grid)  # refuses what is no permutation

    def events() -> Iterator[Event]:
        frames = figures.generation_frames(images, order, grid, known=asked.known)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"order.{asked.format}"
            figures.save_animation(path, frames, math.ceil(n**0.5), max(1, 128 // max(images.shape[1:3])))
            yield {"file": base64.b64encode(path.read_bytes()).decode()}

    return events()
