"""The stage that generates the images to be evaluated."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from anyorder.contracts import at_least, class_labels, require
from anyorder.data.caches import TokenSet
from anyorder.files import load_array, read_manifest
from anyorder.inference import figures
from anyorder.method.guidance import GuidanceConfig
from anyorder.method.sampling import Sampling
from anyorder.settings import parse_stored
from anyorder.stages.artifacts import Artifact
from anyorder.stages.common import SHOWN, Rows, as_condition
from anyorder.stages.generation import GeneratingStage


@dataclass(kw_only=True)
class SampleStage(GeneratingStage):
    """Generate images for the classes, attributes and captions of the test split, or for prompts."""

    together: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = (*GeneratingStage.inputs, "settings")
    settings: Path | None = None
    """Tune artifact whose best temperature and guidance scale are taken, of the same policy and further
    sampling and guidance."""
    num_images: int = 1000
    """Number of images, at least 1; by default 1000."""
    prompts: tuple[str, ...] = ()
    """Generate for these texts alone, num_images / len(prompts) images for each, all from the same seeds;
    ["a text, with a comma"] in brackets and quotes."""
    classes: Literal["test", "validation", "uniform"] = "test"
    """Generate for the classes, attributes and captions of test or validation images, or for every class
    equally often, without attributes and captions."""
    hide: tuple[str, ...] = ()
    """What the model is not given of the test images: class, captions, or attributes by name."""
    batch_size: int = 64
    """Images generated at once; samples do not depend on it, up to rounding."""
    bf16: bool = True
    """Generate in bfloat16 where the hardware has it; false computes in float32. Inferred orders are always
    rated in float32."""
    compile: bool | None = None
    """Generate through compiled code, on a GPU as CUDA graphs: takes minutes at first, not for converted
    models. null does so on a GPU for 1024 images or more; on a CPU it was measured not to pay."""
    seed: int = 0
    """Image i is generated from seed + i."""

    aside: ClassVar[tuple[str, ...]] = ("compile",)

    def __post_init__(self) -> None:
        at_least(1, self, "num_images", "batch_size")
        at_least(0, self, "seed")
        super().__post_init__()
        kept = self.sampling.temperature == self.guidance.scale == 1
        found = "settings brings temperature and scale: leave sampling.temperature and guidance.scale out"
        require(self.settings is None or kept, found)
        hidden = self.hide or self.classes != "test"
        n, prompts = self.num_images, len(self.prompts)
        text = f"num_images must be a multiple of the {prompts} prompts, and they leave nothing to hide and"
        got = f"got num_images={n}, hide={list(self.hide)}, classes={self.classes}"
        require(not prompts or not (hidden or n % prompts), f"{text} no classes: {got}")

    @property
    def _scaled(self) -> bool:
        return self.settings is not None or super()._scaled

    def run(self, artifact: Artifact) -> dict[str, Any]:
        """Write `{images,tokens,order,log_prob,labels,seconds,steps}.npy` and figures of the first samples.

        Where the model takes more than classes, `condition.npy` (n, 1 + A + L) int64 is the condition. Works
        batch by batch; a killed run goes on after its last batch.
        """
        assert self.tokens
        tokens = TokenSet(self.tokens, "test" if self.classes == "uniform" else self.classes)
        pipe = self.load_pipeline(tokens, self.num_images, bf16=self.bf16, compiled=self.compile)
        sampling, guidance = self._tuned()
        conditions, per_prompt = self._conditions(tokens), self.num_images // max(1, len(self.prompts))
        given = tokens.without(conditions, self.hide)
        arrays, what = _arrays(tokens, pipe.tokenizer.factor, conditions), f"samples, {self.policy.label}"
        rows = Rows(artifact.folder, arrays, self.num_images, self.batch_size, what)
        for some in rows:
            begin = time.perf_counter()
            made = pipe(
                None, len(some), self.policy, guidance,
                [self.seed + int(row) % per_prompt for row in some],
                sampling=sampling, grid=tokens.grid,
                condition=as_condition(pipe.model, tokens, given[some]), batch_size=len(some),
            )  # fmt: skip
            arrays = {k: getattr(made, k).cpu().numpy() for k in ("tokens", "order", "log_prob", "steps")}
            rows.append(
                images=np.stack([np.asarray(image) for image in made.images]),
                labels=class_labels(conditions[some]).numpy(),
                seconds=np.full(len(some), (time.perf_counter() - begin) / len(some)),
                **arrays,
                **({"condition": conditions[some].numpy()} if conditions.ndim > 1 else {}),
            )
        if not artifact.leads:
            return {}
        self._figures(artifact.folder, tokens)
        seconds = load_array(artifact.folder / "seconds.npy")
        return {
            "examples": self.num_images,
            "seconds": float(seconds.sum()),
            "seconds_per_image": float(np.median(seconds)),
            "steps_per_image": float(load_array(artifact.folder / "steps.npy").mean()),
            "policy": self.policy.label,
            "token_blind": self.policy.token_blind,
            "temperature": sampling.temperature,
            "guidance_scale": guidance.scale,
        }

    def _tuned(self) -> tuple[Sampling, GuidanceConfig]:
        """Sampling and guidance, with the best values of a search if `settings` gives one."""
        if self.settings is None:
            return self.sampling, self.guidance
        made = read_manifest(self.settings)
        other = f"{self.settings} is a search for {made.get('policy')}, not for {self.policy.label}"
        require(made.get("policy") == self.policy.label, f"{other}: run tune with this policy")
        for name, mine in {"sampling": self.sampling, "guidance": self.guidance}.items():
            its = vars(parse_stored(type(mine), made["config"].get(name, {})))
            differ = [f"{name}.{key}={value}" for key, value in its.items() if value != getattr(mine, key)]
            text = f"{self.settings} is a search with {' '.join(differ)}: say so here, too, or search anew"
            require(not differ, text)
        best, scale = made["best"], made["best"]["guidance_scale"]
        guidance = replace(self.guidance, scale=scale) if scale != 1 else GuidanceConfig()
        return replace(self.sampling, temperature=best["temperature"]), guidance

    def _conditions(self, tokens: TokenSet) -> Tensor:
        """The condition of each image, (n,) or (n, 1 + A + L) int64."""
        if self.prompts:
            each = [prompt for prompt in self.prompts for _ in range(self.num_images // len(self.prompts))]
            return tokens.vocabulary.condition(self.num_images, prompts=each)
        if self.classes == "uniform":
            shuffled = np.random.default_rng(self.seed).permutation(self.num_images)
            labels = shuffled % max(1, len(tokens.classes))
            every = tokens.vocabulary.condition(self.num_images, labels.tolist())
            return every if tokens.further.shape[1] else every[:, 0]
        return tokens.batch(stratified(tokens.labels, self.num_images, self.seed))[1]

    def _figures(self, folder: Path, tokens: TokenSet) -> None:
        """The first samples: a grid, half of them with their orders, an animation; a row for each prompt."""
        images = load_array(folder / "images.npy")
        if self.prompts:
            first = np.arange(self.num_images).reshape(len(self.prompts), -1)[:, :8]
            grid = figures.prompt_grid([np.array(images[row]) for row in first], self.prompts)
            figures.save_image(grid, folder / "prompts.png")
        orders = load_array(folder / "order.npy")[:SHOWN].astype(np.int64)
        figures.save_sample_figures(folder, np.array(images[:SHOWN]), orders, tokens.grid)


def stratified(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Draw n rows, of each class as many as its share of `labels` asks for (to less than 1).

    With classes drawn at random their mix differs from that of the real images, which adds to FD what the
    model has no part in: four classes and 1,000 images gave 0.005 or 0.04 by the seed alone.
    """
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(labels))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return generator.permutation(rows[np.arange(n) * len(rows) // n])


def _arrays(tokens: TokenSet, factor: int, conditions: Tensor) -> dict[str, Any]:
    n, size = (tokens.grid.n,), (tokens.grid.h * factor, tokens.grid.w * factor, 3)
    arrays: dict[str, Any] = {"images": (size, np.uint8), "tokens": (n, np.int32), "order": (n, np.uint16)}
    arrays |= {"log_prob": (n, np.float32), "labels": ((), np.int64), "seconds": ((), np.float32)}
    arrays |= {"steps": ((), np.uint16)}
    if conditions.ndim > 1:
        arrays["condition"] = (tuple(conditions.shape[1:]), np.int64)
    return arrays
