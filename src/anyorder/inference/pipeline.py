"""`Pipeline`: a tokenizer and an any-order model that generate images, in the manner of diffusers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from anyorder import contracts, orders
from anyorder.contracts import Grid, require
from anyorder.data.classes import index_of
from anyorder.data.images import to_uint8
from anyorder.inference import device as devices
from anyorder.inference import folders, inpainting, masks
from anyorder.inference.output import PipelineOutput
from anyorder.inference.request import VALUES, ImageRequest, takes_request
from anyorder.method import decoding, policy_config
from anyorder.method.guidance import Guided
from anyorder.method.loss import image_nll
from anyorder.method.sampling import Streams
from anyorder.models.compiled import compile_decoding

Callback = Callable[["Pipeline", int, contracts.Step], Any]
"""Called after each step with the pipeline, the number of the step from 0, and what it revealed."""

Prepared = tuple[contracts.AnyOrderModel, contracts.OrderPolicy, Streams, decoding.GenerationOptions]
"""The arguments of `decoding.generate` for all images."""
Batch = tuple[Tensor, contracts.AnyOrderModel, contracts.OrderPolicy, Streams, decoding.GenerationOptions]
"""Row numbers (b,) of some images, and the arguments of `decoding.generate` for them."""


class Pipeline(folders.Parts):
    """Generates images; made of `Parts`, or by `Pipeline.from_pretrained(folder)`.

    Example:
        >>> pipe = Pipeline.from_pretrained("runs/quickstart/pipeline")
        >>> pipe(class_labels="red", num_images=4, generator=0).images[0].save("sunset.png")
    """

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        allow_own: bool = False,
    ) -> "Pipeline":
        """Load a folder, "fashion32", "fashion64" or "emoji64" of the package, or one of the hub.

        Args:
            path_or_hub_id: a published model is named by its file, such as "hp-l33/ARPG/arpg_300m.pt".
            device: "cuda", "mps" or "cpu"; by default the first GPU if there is one.
            dtype: of the any-order models, torch.bfloat16 say; by default float32. Other orders come out,
                and images are decoded under autocast.
            allow_own: load own parts (docs/how-to/extend.md) that a pipeline of the hub names: modules that
                are installed here. Code of the repository itself is never run.

        Raises:
            FileNotFoundError: neither a folder nor a reachable hub id.
            ValueError: the folder is damaged, a known repository has no such file, own parts that are not
                allowed or not installed, or no such device.
        """
        parts = folders.find_parts(path_or_hub_id, allow_own)
        pipe = cls(**vars(parts)).to(devices.device(None if device is None else str(device)))
        return pipe if dtype is None else pipe.to(dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads: safetensors and JSON."""
        folders.save_parts(folder, self)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool = False) -> str:
        """Upload the pipeline to the Hugging Face hub; returns the address of the commit."""
        return folders.upload(self, repo_id, token, private)

    def to(self, target: torch.device | str | torch.dtype) -> "Pipeline":
        """Move all networks to a device, or the any-order models to a dtype."""
        networks = (self.model, self.scorer, None if isinstance(target, torch.dtype) else self.tokenizer)
        for network in filter(None, networks):
            network.to(target)
        return self

    def compile_decoding(self, asked: bool | None = True, images: int = 0) -> "Pipeline":
        """Generate with compiled code from now on, on a GPU with CUDA graphs; call it after `to`.

        Each new batch size takes minutes at first. Arguments, errors: see `models.compiled.compile_decoding`.
        """
        for model in filter(None, (self.model, self.scorer)):
            compile_decoding(model, asked, images)
        return self

    def __repr__(self) -> str:
        """What the pipeline is made of, line by line."""
        (h, w), factor, guided = (self.model.grid.h, self.model.grid.w), self.tokenizer.factor, self.guidance
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        names = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        lines = {
            "images": f"{h * factor} x {w * factor} pixels, {h} x {w} patches",
            "model": f"{type(self.model).__name__}, {size:.1f} million parameters, {dtype} on {self.device}",
            "tokenizer": f"{type(self.tokenizer).__name__}, {self.tokenizer.vocab_size} tokens",
            "classes": f"{self.model.num_classes}{names and ': '}{names}",
            "texts": f"{self.vocabulary.length} tokens" if self.vocabulary.length else "",
            "attributes": ", ".join(self.vocabulary.attributes),
            "order": self.policy.label,
            "guidance": f"{guided.scale:g}, {guided.schedule}" if guided.scale != 1 else "",
            "sampling": "" if self.sampling == folders.Parts.sampling else str(self.sampling),
            "scorer": "" if self.scorer is None else type(self.scorer).__name__,
        }
        shown = [f"  {name:10} {text}" for name, text in lines.items() if text]
        return "\n".join([f"{type(self).__name__}:", *shown])

    @takes_request
    def __call__(
        self,
        *request: Any,
        batch_size: int = 64,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Generate images; takes the fields of `ImageRequest`, which are documented there.

        Args:
            *request: see `ImageRequest`.
            batch_size: images generated at once; more images show a progress bar and take no more memory.
            callback_on_step_end: called after each step of each batch, see `Callback`.
            **settings: see `ImageRequest`.

        Raises:
            TypeError: an unknown argument.
            ValueError: unknown label, attribute or order, or settings that do not fit together.
        """
        prepared = self._prepare(ImageRequest.of(*request, **settings), callback_on_step_end)
        made = []
        with devices.memory_for(batch_size):
            for _, model, policy, streams, options in self._batches(batch_size, prepared):
                # Unpacked here, so that the generator runs without a frame of `trace` on the stack.
                found = decoding.trace([*decoding.generate(model, policy, streams, **options)])
                made.append(self._output(found, options["grid"]))
        return PipelineOutput.joined(made)

    @takes_request
    def stream(self, *request: Any, **settings: Any) -> Iterator[contracts.Step]:
        """The same as a call, step by step: for progress bars, animations and web pages."""
        model, policy, streams, options = self._prepare(ImageRequest.of(*request, **settings))
        return decoding.generate(model, policy, streams, **options)

    @takes_request
    def complete(
        self,
        image: Any,
        mask: Any = None,
        *request: Any,
        pad: Sequence[int] | None = None,
        keep: float | None = None,
        feather: int | None = None,
        margin: int | None = None,
        batch_size: int = 64,
        callback_on_step_end: Callback | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Generate parts of given images: inpainting, outpainting, editing by class, variations.

        Pixels outside of the hole stay as they are, bit by bit; masked pixels have no influence at all. Takes
        the fields of `ImageRequest` but `grid`, too; completion i uses seed + i.

        Args:
            image: a path, a Pillow image or a uint8 array (H, W, 3), or several of one size; sides divisible
                by the tokenizer's factor.
            mask: *white (True) is generated, black (False) and transparent are kept*: a path, a Pillow image
                or a bool array (H, W) of the size of the image, for all images or one each.
            *request: see `ImageRequest`.
            pad: pixels to add on the left, top, right and bottom, and to generate: outpainting.
            keep: instead of these, the share of tokens that stay, chosen at random: variations. All pixels
                are then the tokenizer's.
            feather: pixels inside the hole over which the step at its seam fades out; 2 by default.
            margin: patches around the hole whose tokens are generated as well; 0 by default.
            batch_size: images completed at once.
            callback_on_step_end: called after each step of images that are completed together.
            **settings: see `ImageRequest`.

        Raises:
            ValueError: an image or mask that cannot be read or does not fit, nothing to generate, or settings
                that do not fit together.
        """
        asked, filling = ImageRequest.of(*request, **settings), {"margin": margin, "feather": feather}
        begin, prepared = self._unfinished(image, mask, asked, pad, keep, filling, callback_on_step_end)
        made = []
        with devices.memory_for(batch_size):
            for rows, model, policy, streams, options in self._batches(batch_size, prepared):
                begun = begin(rows, streams)
                trace = decoding.complete(model, begun.tokens, begun.known, policy, streams, **options)
                with devices.autocast_like(self.model):  # as images are decoded that are generated whole
                    found = begun.finish(self.tokenizer, trace.tokens)
                shown = [Image.fromarray(one) for one in found.permute(0, 2, 3, 1).cpu().numpy()]
                numbers = trace.order, trace.tokens, trace.log_prob, begun.grid, trace.steps
                made.append(PipelineOutput(shown, *numbers, begun.known))
        return PipelineOutput.joined(made)

    @takes_request
    def stream_completion(
        self,
        image: Any,
        mask: Any = None,
        *request: Any,
        pad: Sequence[int] | None = None,
        keep: float | None = None,
        **settings: Any,
    ) -> Iterator[tuple[inpainting.Unfinished, contracts.Step]]:
        """As `complete` of images that keep equally many tokens, step by step, each beside what was known."""
        asked = ImageRequest.of(*request, **settings)
        begin, (model, policy, streams, options) = self._unfinished(image, mask, asked, pad, keep, {})

        def steps() -> Iterator[tuple[inpainting.Unfinished, contracts.Step]]:
            begun = begin(torch.arange(len(streams), device=self.device), streams)
            known = inpainting.known_part(begun.tokens, begun.known)
            for step in decoding.generate(model, policy, streams, known=known, **options):
                yield begun, step

        return steps()

    def _unfinished(
        self,
        image: Any,
        mask: Any,
        asked: ImageRequest,
        pad: Sequence[int] | None,
        keep: float | None,
        filling: dict[str, int | None],
        callback: Callback | None = None,
    ) -> tuple[Callable[[Tensor, Streams], inpainting.Unfinished], Prepared]:
        """What begins the completion of some rows (b,) of the images, and the arguments of `_batches`."""
        require(asked.grid is None, "the grid of a completion is that of the image: leave out grid")
        how = {name: n for name, n in filling.items() if n is not None}
        both = keep is not None and (mask is not None or pad is not None or how)
        require(not both, "give either keep=..., or mask=... and pad=... with margin and feather")
        require(keep is None or 0 <= keep < 1, f"keep must be a share of tokens in [0, 1), got {keep}")
        images = masks.read_images(image)
        if len(images) == 1:
            images = images.repeat(asked.columns(asked.num_images)[0], 0)
        images, hole = masks.canvas(images, mask, pad) if keep is None else (images, None)
        pixels, grid = self._pixels(images)
        fill = inpainting.Filling(**how)

        def begin(rows: Tensor, streams: Streams) -> inpainting.Unfinished:
            if hole is None:
                return inpainting.with_part(self.tokenizer, pixels[rows], keep or 0.0, streams)
            gap = torch.from_numpy(hole)[rows.cpu()].to(self.device)
            return inpainting.with_hole(self.tokenizer, pixels[rows], gap, fill)

        return begin, self._prepare(asked, callback, grid, len(images))

    @takes_request
    def score(self, images: Any, *request: Any, batch_size: int = 64, **settings: Any) -> Tensor:
        """Log-likelihoods of images: log p(tokens | order, condition), (B,) float64 nats.

        Takes images as `complete` does and the fields of `ImageRequest` but `grid` and `sampling`. Orders
        that are inferred are extracted first; which orders make this a density: docs/concepts/likelihood.md.
        """
        found, given = [], self._given(images, batch_size, ImageRequest.of(*request, **settings))
        with devices.memory_for(batch_size):
            for tokens, model, policy, streams, options in given:
                condition, grid, n = options.get("condition"), options["grid"], tokens.shape[1]
                fixed = isinstance(policy, policy_config.policies.FixedOrder)
                if fixed and len(policy.sizes(n)) == n:  # one pass of the model
                    nll = image_nll(model, tokens, condition, policy.order.expand_as(tokens), grid)["nll"]
                    found.append(-nll * n)
                else:
                    made = decoding.extract_orders(model, tokens, policy, streams, **options)
                    found.append(contracts.exact(made.log_prob).sum(1))
        return torch.cat(found)

    @takes_request
    def extract_order(self, images: Any, *request: Any, batch_size: int = 64, **settings: Any) -> Tensor:
        """The order in which the model itself would reveal given images, (B, N) int64 (OAR v1, Sec. 3).

        Takes what `score` takes; `order` is by default the pipeline's if that is inferred, else
        "token_likelihood", the paper's rule.
        """
        asked = ImageRequest.of(*request, **settings)
        if asked.order is None and not self.policy.decided:
            asked = ImageRequest(**vars(asked) | {"order": "token_likelihood"})
        with devices.memory_for(batch_size):
            orders = [
                decoding.extract_orders(model, tokens, policy, streams, **options).order
                for tokens, model, policy, streams, options in self._given(images, batch_size, asked)
            ]
        return torch.cat(orders)

    @takes_request
    def coarse_to_fine(self, *request: Any, factor: int = 2, **settings: Any) -> PipelineOutput:
        """Generate images `factor` (>= 2) times as high and wide as those of training.

        See `decoding.sample_coarse_to_fine`. Takes the fields of `ImageRequest` without `grid`; `order` by
        name or a `PolicyConfig`.
        """
        asked = ImageRequest.of(*request, **settings)
        require(asked.grid is None, "factor says the grid of coarse_to_fine: leave out grid")
        model, _, streams, options = self._prepare(asked)
        order = self._order(asked, options.get("condition"), len(streams))[1]  # of either grid
        made = decoding.sample_coarse_to_fine(model, order, streams, factor, **options)
        return self._output(made, Grid(factor * self.model.grid.h, factor * self.model.grid.w))

    @takes_request
    def log_prob_of(self, images: Any, completed: PipelineOutput, *request: Any, **settings: Any) -> Tensor:
        """Log-probability of the true tokens where `complete` with a mask generated others.

        Takes the true images, the result, in which all images keep equally many tokens, and the fields of
        `ImageRequest` as they were given to `complete`. Returns (B, N) float32 nats in order steps, 0 where
        tokens were kept.
        """
        (pixels, grid), asked = self._pixels(masks.read_images(images)), ImageRequest.of(*request, **settings)
        model, policy, streams, options = self._prepare(asked, None, grid, len(pixels))
        if completed.known is None or len(completed.known) != len(pixels):
            raise ValueError("give what complete returned, and one true image for each of its images")
        known = inpainting.known_part(completed.tokens, completed.known)
        targets = self.tokenizer.encode(inpainting.to_float(pixels))
        steps = decoding.generate(model, policy, streams, targets=targets, known=known, **options)
        return decoding.trace(steps, known).log_prob

    def _output(self, made: contracts.Trace, grid: Grid | None) -> PipelineOutput:
        grid = grid or self.model.grid
        images = self.decode(made.tokens, grid)
        return PipelineOutput(images, made.order, made.tokens, made.log_prob, grid, made.steps)

    def decode(self, tokens: Tensor, grid: Grid | tuple[int, int] | None = None) -> list[Image.Image]:
        """Tokens (B, N) to Pillow images; `grid` by default that of training."""
        where = ImageRequest(grid=grid).shape or self.model.grid
        with devices.autocast_like(self.model):
            pixels = self.tokenizer.decode(tokens.to(devices.device_of(self.tokenizer)), where)
        return [Image.fromarray(image) for image in to_uint8(pixels)]

    def typed(self, label: str) -> int | str:
        """A class as users type it: a name, or a number where no class has that name."""
        return int(label) if label.isdecimal() and len(label) < 10 and label not in self.classes else label

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return devices.device_of(self.model)

    def _pixels(self, images: np.ndarray) -> tuple[Tensor, Grid]:
        """Images (B, H, W, 3) uint8 as (B, 3, H, W) beside the weights, and their grid."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        return pixels, inpainting.grid_of(pixels.shape, self.tokenizer.factor)

    def _given(self, images: Any, batch_size: int, asked: ImageRequest) -> Iterator[tuple[Any, ...]]:
        """Batches of given images: their tokens, and the arguments of `decoding.extract_orders`."""
        given = asked.grid is None and asked.sampling is None
        require(given, "the images are given: leave out grid and sampling")
        pixels, grid = self._pixels(masks.read_images(images))
        prepared = self._prepare(asked, None, grid, len(pixels), sampled=False)
        for rows, model, policy, streams, options in self._batches(batch_size, prepared):
            yield self.tokenizer.encode(inpainting.to_float(pixels[rows])), model, policy, streams, options

    def _batches(self, size: int, prepared: Prepared) -> Iterator[Batch]:
        """At most `size` images at a time."""
        require(size >= 1, f"batch_size must be a whole number >= 1, got {size!r}")
        model, policy, streams, options = prepared
        n, condition = len(streams), options.get("condition")
        with tqdm(total=n, unit="image", disable=n <= size) as bar:
            for rows in torch.arange(n, device=self.device).split(size):
                part = options.copy()
                part["condition"] = None if condition is None else condition[rows]
                yield rows, model, policy.subset(rows), streams.subset(rows), part
                bar.update(len(rows))

    def _prepare(
        self,
        request: ImageRequest,
        callback: Callback | None = None,
        grid: Grid | None = None,
        images: int | None = None,
        sampled: bool = True,
    ) -> Prepared:
        """The arguments of `decoding.generate`; errors are found here, before the first step."""
        n, given = request.columns(images or request.num_images)
        text = f"got {n} images for num_images={request.num_images}: give one image, or one for each"
        require(request.num_images in (None, n), text)
        grid, guidance = grid or request.shape or self.model.grid, request.guidance(self.guidance)
        condition = self._condition(n, given)
        if request.guidance_scale is None and sampled and condition is not None:
            guidance = self.guidance
        named, order = self._order(request, condition, n)
        # An order that looks at tokens needs those of the model that samples them.
        scorer = self.scorer if getattr(named, "token_blind", True) else None
        model = self.model if guidance.scale == 1 else Guided(self.model, guidance)
        rated = getattr(named, "rated", getattr(named, "inferred", False))
        if guidance is not self.guidance:  # the pipeline's own is there for every order
            guidance.require_effect(rated=rated, scored=scorer is not None, scaled=guidance.scale != 1)
        guided = scorer is not None and guidance.locations == "guided"
        options = decoding.GenerationOptions(
            condition=condition, grid=grid, sampling=request.tokens or self.sampling,
            scorer=Guided(scorer, guidance) if scorer is not None and guided else scorer,
            on_step=callback and (lambda step: callback(self, step.index, step)),
        )  # fmt: skip
        streams = Streams(request.seeds(n), self.device)
        return model, policy_config.make_policy(order, grid, streams), streams, options

    def _condition(self, n: int, given: dict[str, list[Any]]) -> Tensor | None:
        """The condition (n,) or (n, 1 + A + L) int64 of what is given for each image."""
        if "conditions" in given:
            return torch.stack(given["conditions"]).to(self.device)
        labels = [self._label(label) for label in given["labels"]] if "labels" in given else None
        named = {name.removeprefix(VALUES): given[name] for name in given if name.startswith(VALUES)}
        if named or "prompts" in given:
            return self.vocabulary.condition(n, labels, named, given.get("prompts")).to(self.device)
        return None if labels is None else torch.tensor(labels, device=self.device)

    def _label(self, label: Any) -> int:
        if isinstance(label, str):
            return index_of(label, self.classes, "class")
        require(hasattr(label, "__index__"), f"class labels are names or numbers, got {label!r}")
        text = f"class labels lie in [0, {self.model.num_classes}), got {label}"
        require(0 <= label < self.model.num_classes, text)
        return int(label)

    def _order(self, request: ImageRequest, condition: Tensor | None, n: int) -> tuple[Any, Any]:
        """The order of the request, and as decoding takes it: by class, a function of the grid."""
        order = self.policy if request.order is None else request.order
        if isinstance(order, str):
            order = policy_config.PolicyConfig(order)
        if not isinstance(order, policy_config.PolicyConfig) or not order.by_class:
            return order, order
        if self.class_orders is None:
            text = f"this pipeline has no orders of classes: choose another order than {order.label}"
            raise ValueError(text)
        labels = torch.full((n,), -1) if condition is None else contracts.class_labels(condition).cpu()
        rows, streams = orders.of_classes(self.class_orders, labels), Streams([], self.device)
        build = order.build
        return order, lambda grid: build(grid, streams, orders.stretch(rows, self.model.grid, grid))
