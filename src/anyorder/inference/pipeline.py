"""`Pipeline`: a tokenizer and an any-order model that draw pictures, in the manner of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyorder.contracts import AnyOrderModel, AnyOrderNetwork, Grid, Step, TokenizerNetwork, class_labels
from anyorder.data.captions import Vocabulary, index_of
from anyorder.data.images import to_uint8
from anyorder.inference.device import device
from anyorder.inference.folders import INDEX, Parts, load_parts, save_parts
from anyorder.inference.inpainting import Completion, Filling, complete_images, vary_images
from anyorder.inference.masks import pad as pad_canvas
from anyorder.inference.masks import read_masks, read_pictures
from anyorder.method.decoding import generate, sample_coarse_to_fine, trace
from anyorder.method.guidance import GuidanceConfig, Guided, Schedule
from anyorder.method.policies import InferredOrder, LocatedOrder
from anyorder.method.policy_config import INFERRED, PolicyConfig, make_policy
from anyorder.method.sampling import Sampling, Streams
from anyorder.models.compiled import compile_decoding
from anyorder.orders import of_classes

BUNDLED = Path(__file__).parent.parent / "pretrained"


def bundled() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{INDEX}"))


@dataclass
class PipelineOutput:
    """What a call of a pipeline returns."""

    images: list[Image.Image]
    order: Tensor
    """(B, N) int64, order[b, i] = raster position revealed at step i."""
    tokens: Tensor
    """(B, N) int64, raster order."""
    log_prob: Tensor
    """(B, N) float32, nats, in order steps: of each token under the (guided) model when it was drawn."""
    known: Tensor | None = None
    """(B, N) bool, of `complete`: tokens that were kept; in `order` they come first."""


class Pipeline:
    """Draws images; `Pipeline.from_pretrained(folder)` makes one.

    Example:
        >>> pipe = Pipeline.from_pretrained("runs/quickstart/pipeline")
        >>> pipe(class_labels="red", num_images=4, generator=0).images[0].save("sunset.png")
    """

    def __init__(
        self,
        model: AnyOrderNetwork,
        tokenizer: TokenizerNetwork,
        classes: Sequence[str] = (),
        policy: PolicyConfig | None = None,
        scorer: AnyOrderNetwork | None = None,
        class_orders: Tensor | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        """Put parts together.

        Args:
            model: any-order model.
            tokenizer: the one whose tokens the model was trained on.
            classes: class names, for labels given by name.
            policy: the order to draw in unless told otherwise; lowest entropy first by default.
            scorer: the model that decides where, for inferred token-blind orders; `model` itself by default.
            class_orders: (classes, N) int64, each class's own order, for order "class_mean".
            vocabulary: what pictures may be asked to be besides their class, if the model takes more.

        Raises:
            ValueError: the parts do not fit together.
        """
        if model.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model has {model.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: "
                "give the tokenizer that the model was trained with"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer.eval()
        self.classes = list(classes)
        self.policy = policy or PolicyConfig()
        self.scorer = scorer.eval() if scorer is not None else None
        self.class_orders = class_orders
        self.vocabulary = vocabulary or Vocabulary(self.classes)

    # --- to and from disk and hub --------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> Pipeline:
        """Load a pipeline folder, a model that comes with the package, or one from the Hugging Face hub.

        Args:
            path_or_hub_id: a folder, "fashion32" (comes with the package), the id of a repository that holds
                one, or a published model by its file ("hp-l33/ARPG/arpg_300m.pt"; see docs/adapters.md) with
                its tokenizer.

        Raises:
            FileNotFoundError: neither a folder nor a reachable hub id.
            ValueError: the folder is damaged, or a known repository has no such file.
        """
        folder = Path(path_or_hub_id)
        if not folder.is_dir() and str(path_or_hub_id) in bundled():
            folder = BUNDLED / path_or_hub_id
        parts = load_parts(folder) if folder.is_dir() else _download(str(path_or_hub_id))
        rest = (parts.classes, parts.policy, parts.scorer, parts.class_orders, parts.vocabulary)
        return cls(parts.model, parts.tokenizer, *rest).to(device())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads: safetensors and JSON."""
        more = self.vocabulary if self.vocabulary.attributes or self.vocabulary.length else None
        rest = (self.classes, self.policy, self.scorer, self.class_orders, more)
        save_parts(folder, Parts(self.model, self.tokenizer, *rest))

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the pipeline to the Hugging Face hub; returns the address of the commit."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def to(self, target: torch.device | str | torch.dtype) -> Pipeline:
        """Move all networks to a device, or the any-order models to a dtype."""
        self.model.to(target)
        if self.scorer is not None:
            self.scorer.to(target)
        if not isinstance(target, torch.dtype):
            self.tokenizer.to(target)
        return self

    def compile_decoding(self) -> Pipeline:
        """Draw with compiled code from now on, on a GPU with CUDA graphs; call it after `to`.

        Each new number of images takes minutes at first; see `models.compiled.compile_decoding`.

        Raises:
            ValueError: a published model, or there is no compiler.
        """
        for model in filter(None, (self.model, self.scorer)):
            compile_decoding(model)
        return self

    # --- drawing -------------------------------------------------------------------------------------

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        order: str | Tensor | PolicyConfig | None = None,
        guidance_scale: float | GuidanceConfig = 1.0,
        generator: int | Sequence[int] | torch.Generator = 0,
        *,
        guidance_schedule: Schedule = "constant",
        sampling: Sampling | None = None,
        grid: Grid | tuple[int, int] | None = None,
        prompt: str | Sequence[str] | None = None,
        attributes: Mapping[str, str | Sequence[str | None]] | None = None,
    ) -> PipelineOutput:
        """Draw images.

        Args:
            class_labels: one label or one per image, by index or name; None draws unconditionally.
            num_images: how many; the number of labels, prompts or values of an attribute by default.
            order: "random", a static order ("raster", "hilbert", ...), a score ("entropy", "max_prob",
                "margin", "token_likelihood", "information"), "location" (a location head), "class_mean"
                (the order of each image's class), an order (N,) or (B, N), or a `PolicyConfig`; the
                pipeline's own policy by default.
            guidance_scale: 1 is none; more pulls images towards what they are asked to be. A `GuidanceConfig`
                says all.
            generator: a seed (image i uses seed + i), one seed per image, or a `torch.Generator` that
                the seeds are drawn from. An image depends on its own seed only.
            guidance_schedule: how the scale grows while the image is drawn.
            sampling: temperature, top-k, top-p, min-p.
            grid: rows and columns of patches, where it is not the grid of training.
            prompt: a text, or one per image, for a model that was trained with captions; "" is none.
            attributes: values by name, {"baseColour": "Red"}, one or one per image (None: none), for a model
                that was trained with attributes.

        Raises:
            ValueError: unknown label, attribute or order, or numbers that do not fit together.
        """
        steps = self.stream(
            class_labels, num_images, order, guidance_scale, generator,
            guidance_schedule=guidance_schedule, sampling=sampling, grid=grid,
            prompt=prompt, attributes=attributes,
        )  # fmt: skip
        made = trace(steps)
        return PipelineOutput(self.decode(made.tokens, grid), made.order, made.tokens, made.log_prob)

    def stream(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        order: str | Tensor | PolicyConfig | None = None,
        guidance_scale: float | GuidanceConfig = 1.0,
        generator: int | Sequence[int] | torch.Generator = 0,
        *,
        guidance_schedule: Schedule = "constant",
        sampling: Sampling | None = None,
        grid: Grid | tuple[int, int] | None = None,
        prompt: str | Sequence[str] | None = None,
        attributes: Mapping[str, str | Sequence[str | None]] | None = None,
    ) -> Iterator[Step]:
        """The same as a call, step by step: for progress bars, animations and web pages."""
        condition, n = self._condition(class_labels, prompt, attributes or {}, num_images)
        grid = self._grid(grid)
        streams = Streams(_seeds(generator, n), self._device)
        policy = make_policy(self._order(order, condition, n, grid), grid, streams)
        return generate(
            self._drawer(guidance_scale, guidance_schedule), policy, streams,
            condition=condition, grid=grid, sampling=sampling or Sampling(), scorer=self._scorer(policy),
        )  # fmt: skip

    def complete(
        self,
        image: Any,
        mask: Any = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        order: str | Tensor | PolicyConfig | None = None,
        guidance_scale: float | GuidanceConfig = 1.0,
        generator: int | Sequence[int] | torch.Generator = 0,
        *,
        pad: Sequence[int] | None = None,
        keep: float | None = None,
        feather: int = Filling.feather,
        margin: int = Filling.margin,
        guidance_schedule: Schedule = "constant",
        sampling: Sampling | None = None,
        prompt: str | Sequence[str] | None = None,
        attributes: Mapping[str, str | Sequence[str | None]] | None = None,
    ) -> PipelineOutput:
        """Draw parts of given images: inpainting, outpainting, editing by class, variations.

        Pixels outside of the hole stay as they are, bit by bit; masked pixels have no influence at all.

        Args:
            image: a Pillow image or uint8 array (H, W, 3), or several of one size; sides divisible by the
                tokenizer's factor, any grid.
            mask: *white (True) is drawn, black (False) is kept*: a Pillow image or bool array (H, W), for all
                images, or one each. White everywhere draws a new image; black everywhere is refused.
            class_labels: as of a call; what to draw where it is masked.
            num_images: completions of one image, or of one image each; the number of images by default.
            order: as of a call, for what is to be drawn.
            guidance_scale: as of a call.
            generator: as of a call; completion i uses seed + i.
            pad: pixels to add on the left, top, right and bottom, and to draw: outpainting. A mask beside it
                has the size of the image; both are drawn.
            keep: instead of a mask, the share of tokens that stay, chosen at random: variations. All pixels
                are then the tokenizer's.
            feather: pixels inside the hole over which the step at its seam fades out.
            margin: patches around the hole whose tokens are drawn as well.
            guidance_schedule: as of a call.
            sampling: temperature, top-k, top-p, min-p.
            prompt: as of a call.
            attributes: as of a call.

        Raises:
            ValueError: a mask of another size or with nothing to draw, sides that are not divisible by the
                factor, an unknown label, or settings that do not go together.
        """
        images = read_pictures(image)
        images = images.repeat(num_images or 1, 0) if len(images) == 1 else images
        condition, n = self._condition(class_labels, prompt, attributes or {}, len(images))
        if num_images not in (None, n):
            raise ValueError(f"got {n} images for num_images={num_images}: give one image, or one for each")
        streams = Streams(_seeds(generator, n), self._device)
        canvas, hole = (images, None) if keep is not None else _holes(images, mask, pad)
        h, w = (side // self.tokenizer.factor for side in canvas.shape[1:3])
        chosen = self._order(order, condition, n, Grid(max(1, h), max(1, w)))
        settings: dict[str, Any] = {
            "condition": condition,
            "sampling": sampling or Sampling(),
            "scorer": self._scorer(chosen),
        }
        model = self._drawer(guidance_scale, guidance_schedule)
        if keep is not None:
            if mask is not None or pad is not None:
                raise ValueError("give either keep=..., or mask=... and pad=...")
            made = vary_images(model, self.tokenizer, self._pixels(canvas), keep, chosen, streams, **settings)
        else:
            made = complete_images(
                model, self.tokenizer, self._pixels(canvas), torch.from_numpy(hole).to(self._device), chosen,
                streams, filling=Filling(margin, feather), **settings,
            )  # fmt: skip
        return _output(made)

    def coarse_to_fine(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        order: str | PolicyConfig | None = None,
        guidance_scale: float | GuidanceConfig = 1.0,
        generator: int | Sequence[int] | torch.Generator = 0,
        *,
        factor: int = 2,
        guidance_schedule: Schedule = "constant",
        sampling: Sampling | None = None,
        prompt: str | Sequence[str] | None = None,
        attributes: Mapping[str, str | Sequence[str | None]] | None = None,
    ) -> PipelineOutput:
        """Draw images `factor` times as high and wide as those of training; see `sample_coarse_to_fine`.

        Args:
            class_labels: as of a call.
            num_images: as of a call.
            order: the name of an order, or a `PolicyConfig`.
            guidance_scale: as of a call.
            generator: as of a call.
            factor: >= 2.
            guidance_schedule: as of a call.
            sampling: temperature, top-k, top-p, min-p.
            prompt: as of a call.
            attributes: as of a call.

        Raises:
            ValueError: as of a call, or a factor below 2.
        """
        condition, n = self._condition(class_labels, prompt, attributes or {}, num_images)
        grid = Grid(factor * self.model.grid.h, factor * self.model.grid.w)
        chosen = self._order(order, condition, n, grid)
        streams = Streams(_seeds(generator, n), self._device)
        model = self._drawer(guidance_scale, guidance_schedule)
        made = sample_coarse_to_fine(
            model, chosen, streams, factor,
            condition=condition, sampling=sampling or Sampling(), scorer=self._scorer(chosen),
        )  # fmt: skip
        return PipelineOutput(self.decode(made.tokens, grid), made.order, made.tokens, made.log_prob)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _pixels(self, images: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 to a tensor (B, 3, H, W) uint8 beside the weights."""
        return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(self._device)

    def _drawer(self, guidance: float | GuidanceConfig, schedule: Schedule) -> AnyOrderModel:
        """The model that draws, guided if it is to be."""
        if not isinstance(guidance, GuidanceConfig):
            guidance = GuidanceConfig(guidance, schedule)
        return Guided(self.model, guidance) if guidance.scale != 1 else self.model

    def _order(self, order: Any, condition: Tensor | None, n: int, grid: Grid) -> Any:
        """The order to draw in; for class_mean that of each image's class, or the mean of all of them."""
        order = self.policy if order is None else order
        policy = PolicyConfig("class_mean") if isinstance(order, str) and order == "class_mean" else order
        if not isinstance(policy, PolicyConfig) or policy.order != "class_mean":
            return order
        if self.class_orders is None:
            raise ValueError("this pipeline has no orders of classes: choose another order than class_mean")
        if grid != self.model.grid:
            own = self.model.grid
            raise ValueError(
                f"class_mean covers {own.h} x {own.w} patches, got {grid.h} x {grid.w}: "
                "give another order, say entropy"
            )
        labels = torch.full((n,), -1) if condition is None else class_labels(condition).cpu()
        orders = of_classes(self.class_orders, labels).to(self._device)
        return policy.build(grid, Streams([], self._device), orders)

    def _scorer(self, order: Any) -> AnyOrderModel | None:
        """The scorer, for orders that it can decide: inferred and token-blind ones, and a location head's."""
        if isinstance(order, str) and order in (*INFERRED, "location"):
            order = PolicyConfig(order)
        if isinstance(order, PolicyConfig):
            decides = order.inferred or order.order == "location"
        else:
            decides = isinstance(order, InferredOrder | LocatedOrder)
        return self.scorer if decides and order.token_blind else None

    def decode(self, tokens: Tensor, grid: Grid | tuple[int, int] | None = None) -> list[Image.Image]:
        """Tokens (B, N) to Pillow images."""
        pixels = self.tokenizer.decode(tokens.to(next(self.tokenizer.parameters()).device), self._grid(grid))
        return [Image.fromarray(image) for image in to_uint8(pixels)]

    def _grid(self, grid: Grid | tuple[int, int] | None) -> Grid:
        if grid is None:
            return self.model.grid
        return grid if isinstance(grid, Grid) else Grid(*grid)

    def _condition(
        self,
        labels: int | str | Sequence[int | str] | None,
        prompt: str | Sequence[str] | None,
        attributes: Mapping[str, str | Sequence[str | None]],
        n: int | None,
    ) -> tuple[Tensor | None, int]:
        """What each image is asked to be, and the number of images."""
        named = {name: f"values of {name}" for name in attributes}
        given = {"labels": labels, "prompts": prompt, **{named[name]: attributes[name] for name in named}}
        lists = {name: _listed(value) for name, value in given.items() if value is not None}
        if n is None:
            n = max(map(len, lists.values()), default=1)
        _positive(n)
        for name, values in lists.items():
            if len(values) not in (1, n):
                raise ValueError(f"got {len(values)} {name} for num_images={n}: give one, or one per image")
            lists[name] = values * n if len(values) == 1 else values
        codes = [self._label(label) for label in lists["labels"]] if labels is not None else None
        if prompt is None and not attributes:
            return (None if codes is None else torch.tensor(codes, device=self._device)), n
        asked = {name: lists[named[name]] for name in attributes}
        return self.vocabulary.condition(n, codes, asked, lists.get("prompts")).to(self._device), n

    def typed(self, label: str) -> int | str:
        """A class as users type it: a name, or a number where no class has that name."""
        return int(label) if label.isdecimal() and label not in self.classes else label

    def _label(self, label: int | str) -> int:
        if isinstance(label, str):
            return index_of(label, self.classes, "class")
        if not 0 <= label < self.model.num_classes:
            raise ValueError(f"class labels lie in [0, {self.model.num_classes}), got {label}")
        return label


def _holes(images: np.ndarray, mask: Any, padding: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The canvas (B, H, W, 3) uint8 and what is to be drawn of it (B, H, W) bool."""
    if mask is None and padding is None:
        raise ValueError("say what to draw: mask=..., pad=... or keep=...")
    n, h, w, _ = images.shape
    hole = np.zeros((n, h, w), np.bool_) if mask is None else read_masks(mask, n, (h, w))
    return (images, hole) if padding is None else pad_canvas(images, hole, padding)


def _output(made: Completion) -> PipelineOutput:
    pictures = [Image.fromarray(image) for image in made.images.permute(0, 2, 3, 1).cpu().numpy()]
    return PipelineOutput(pictures, made.trace.order, made.trace.tokens, made.trace.log_prob, made.known)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, int | str) else list(value)


def _positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"num_images must be >= 1, got {n}")
    return n


def _seeds(generator: int | Sequence[int] | torch.Generator, n: int) -> list[int]:
    if isinstance(generator, torch.Generator):
        return torch.randint(2**31, (n,), generator=generator, device=generator.device).tolist()
    if isinstance(generator, int):
        return [generator + i for i in range(n)]
    if len(generator) != n:
        raise ValueError(f"got {len(generator)} seeds for {n} images: give one seed, or one per image")
    return [int(seed) for seed in generator]


def _download(hub_id: str) -> Parts:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from anyorder.inference.hub import find, load_published

    published = find(hub_id)
    try:
        if published is not None:
            return load_published(published)
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.npy"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise FileNotFoundError(
            f"'{hub_id}' is neither a folder nor a hub id that can be reached: {e}"
        ) from e
    return load_parts(folder)
