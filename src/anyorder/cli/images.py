"""The commands `anyorder sample pipeline=...` and `anyorder complete`: images from a pipeline."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from anyorder.contracts import at_least, require
from anyorder.data.images import load_image
from anyorder.files import expanded, sha256
from anyorder.inference import figures, masks
from anyorder.inference.folders import BUNDLED, find_parts
from anyorder.inference.pipeline import Pipeline
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.settings import parse
from anyorder.stages.artifacts import Artifact

SAMPLE_FIGURES = ("grid.png", "orders.png", "generation.webp")
"""What `figures.save_sample_figures` writes."""


@dataclass(kw_only=True)
class _ImageConfig:
    pipeline: str
    """Folder of a pipeline, "fashion32", "fashion64" or "emoji64" of the package, or a hub id."""
    policy: PolicyConfig | None = None
    """The order to generate in; by default the pipeline's policy."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance: 1 is none, larger follows class and prompt closer. By default
    what the pipeline says, which is none unless it was made with some."""
    batch_size: int = 64
    """Images at once; fewer take less memory and give the same images."""
    seed: int = 0
    """Image i is generated from seed + i; by default 0."""
    sampling: Sampling | None = None
    """How tokens are sampled; by default what the pipeline says."""

    renamed: ClassVar[dict[str, str]] = {"guidance": "guidance_scale"}

    def __post_init__(self) -> None:
        at_least(1, self, "num_images", "batch_size")


@dataclass(kw_only=True)
class SampleConfig(_ImageConfig):
    """Generate images with a pipeline: 0000.png, 0001.png, ..., grid.png, orders.png and generation.webp.

    orders.png shows when each patch was generated; generation.webp is an animation of it.
    Settings policy.* and sampling.* change those of the pipeline; policy.order=... and
    sampling.temperature=0 begin with the defaults instead.
    """

    class_labels: tuple[str, ...] | None = ()
    """Names or numbers of classes, in turn; by default all classes in turn, or none beside prompts or
    attributes. null generates without a class."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a pipeline that was trained with captions."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Values by name, such as baseColour: Red, for a pipeline that was trained with attributes."""
    num_images: int = 16
    """Number of images, at least 1; by default 16."""
    scale: int = 4
    """Screen pixels per image pixel in grid.png, orders.png and generation.webp; by default 4."""
    compile: bool = False
    """Generate through compiled code: pays for many images only, since compiling takes a while."""

    renamed = _ImageConfig.renamed | {"n": "num_images", "labels": "class_labels", "prompt": "prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "scale")


@dataclass(kw_only=True)
class CompleteConfig(_ImageConfig):
    """Generate parts of an image: inpainting (mask= or box=), outpainting (pad=), variations (keep=).

    Writes 0000.png, 0001.png, ... into out=FOLDER. Pixels outside of what is generated stay as they are.
    Settings policy.* and sampling.* change those of the pipeline; policy.order=... and
    sampling.temperature=0 begin with the defaults instead.
    """

    image: Path
    """The image; its sides must be divisible by the tokenizer's factor."""
    mask: Path | None = None
    """Image of the same size: white is generated, black and transparent are kept."""
    box: masks.Box | None = None
    """Instead of a mask: the rectangle left,top,right,bottom (pixels) is generated."""
    pad: masks.Padding | None = None
    """Pixels to add on the left,top,right,bottom, and to generate."""
    keep: float | None = None
    """Instead of all these: share of patches to keep, in [0, 1), chosen at random; others are generated."""
    class_labels: tuple[str, ...] = ()
    """Name or number of a class, or one for each completion; by default none."""
    prompt: str | None = None
    """A text, for a pipeline that was trained with captions."""
    num_images: int = 1
    """How many completions; by default 1."""
    feather: int | None = None
    """Pixels inside the hole over which the step at its seam fades out; by default 2, and 0 is none."""
    margin: int | None = None
    """Patches around the hole that are generated, too, while their known pixels are kept; by default 0."""

    renamed: ClassVar[dict[str, str]] = {"label": "class_labels"} | _ImageConfig.renamed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mask is None or self.box is None, "give either mask=... or box=..., not both")


def own_settings(texts: Sequence[str]) -> dict[str, Any]:
    """The pipeline's own policy and sampling, where typed settings (`sampling.top_k=5`) change some of it."""
    typed = {key.strip(): value for key, _, value in (text.partition("=") for text in texts)}
    given = {key.partition(".")[0] for key in typed} & {"policy", "sampling"}
    given -= {"policy"} if "policy.order" in typed else set()
    given -= {"sampling"} if typed.get("sampling.temperature") in ("0", "0.0") else set()
    if not given or not typed.get("pipeline"):
        return {}
    parts = find_parts(typed["pipeline"])
    own = {name: dataclasses.asdict(getattr(parts, name)) for name in given}
    try:
        parse(PolicyConfig, own.get("policy"), [text[7:] for text in texts if text.startswith("policy.")])
    except ValueError as e:
        hint = f"the pipeline's own is '{parts.policy.label}', policy.order=NAME begins with the defaults"
        raise ValueError(f"policy: {e}; {hint}") from e
    return own


def sample_files(config: SampleConfig, out: Path, *, overwrite: bool = False) -> bool:
    """Generate images and write the files; False if they are up to date. Errors as of `Pipeline`."""
    artifact = _open("images", config, out, overwrite, [*_numbered(config.num_images), *SAMPLE_FIGURES])
    if done := not artifact.current:
        with artifact:
            _sample_into(config, out)
            artifact.finish(config.num_images)
    return done


def _sample_into(config: SampleConfig, out: Path) -> None:
    pipe = Pipeline.from_pretrained(config.pipeline)
    if config.compile:
        pipe.compile_decoding()
    labels: list[Any] = [pipe.typed(label) for label in config.class_labels or ()]
    if config.class_labels == () and not config.prompts and not config.attributes:
        labels = [*range(pipe.model.num_classes)][: config.num_images]
    made = pipe(
        labels or None, config.num_images, config.policy, config.guidance_scale, config.seed,
        sampling=config.sampling,
        prompt=config.prompts or None,
        attributes=config.attributes,
        batch_size=config.batch_size,
    )  # fmt: skip
    _save(made.images, out)
    images, orders = np.stack([np.asarray(image) for image in made.images]), made.order.cpu().numpy()
    figures.save_sample_figures(out, images, orders, pipe.model.grid, min(8, config.num_images), config.scale)


def complete_file(config: CompleteConfig, out: Path, *, overwrite: bool = False) -> bool:
    """Complete one image and write the results; False if they are up to date. Errors as of `Pipeline`."""
    artifact = _open("complete", config, out, overwrite, _numbered(config.num_images))
    if done := not artifact.current:
        with artifact:
            _save(_completed(config), out)
            artifact.finish(config.num_images)
    return done


def _completed(config: CompleteConfig) -> list[Image.Image]:
    image = load_image(config.image)
    mask = config.mask if config.box is None else masks.box_mask(config.box, image.shape[:2])
    pipe = Pipeline.from_pretrained(config.pipeline)
    labels = [pipe.typed(label) for label in config.class_labels] or None
    return pipe.complete(
        image, mask, labels, config.num_images, config.policy, config.guidance_scale, config.seed,
        pad=config.pad, keep=config.keep, feather=config.feather, margin=config.margin, prompt=config.prompt,
        sampling=config.sampling, batch_size=config.batch_size,
    ).images  # fmt: skip


def _open(stage: str, config: Any, out: Path, overwrite: bool, names: Sequence[str]) -> Artifact:
    """The folder, locked, unless it holds these very images; what is not ours is not written over.

    The files that the settings name count by their contents.
    """
    folders = (expanded(config.pipeline), BUNDLED / config.pipeline)
    folder = next(filter(Path.is_dir, folders), None)  # of a pipeline of the hub there is none
    paths = [getattr(config, role, None) for role in ("image", "mask")]
    paths += sorted(folder.rglob("*.*")) if folder else []
    own = out.resolve()  # which may lie in the folder of the pipeline
    hashes = [sha256(p) for p in paths if p is not None and p.is_file() and own not in p.resolve().parents]
    identity = {**dataclasses.asdict(config), "sha256": hashes}
    artifact = Artifact(out, stage, identity, {}, _compared, overwrite=overwrite)
    artifact.refuse({*names} & artifact.found)
    return artifact


def _compared(then: dict[str, Any]) -> dict[str, Any]:
    """Settings with every path spelled alike, and a short name of the files' contents in place of hashes."""
    paths = {role: expanded(str(then.get(role))) for role in ("pipeline", "image", "mask")}
    spelled = {role: str(path.resolve()) for role, path in paths.items() if then.get(role) and path.exists()}
    contents = hashlib.sha256(str(then.pop("sha256", [])).encode()).hexdigest()[:8]
    return {**then, **spelled, "contents of the files": contents}


def _numbered(n: int) -> list[str]:
    return [f"{i:04d}.png" for i in range(n)]


def _save(images: Sequence[Any], out: Path) -> None:
    for image, name in zip(images, _numbered(len(images)), strict=True):
        figures.save_image(image, out / name)
