"""The request: one list of arguments for all that a pipeline generates."""

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from anyorder.contracts import Grid, OrderPolicy, require
from anyorder.method.guidance import GuidanceConfig, Schedule
from anyorder.method.policy_config import PolicyConfig
from anyorder.method.sampling import Sampling
from anyorder.settings import did_you_mean

VALUES = "values of "
_NAMES = {
    **dict.fromkeys(("n", "num_images_per_prompt", "num_samples"), "num_images"),
    **dict.fromkeys(("label", "labels", "class_label"), "class_labels"),
    **dict.fromkeys(("guidance", "cfg_scale"), "guidance_scale"),
    **dict.fromkeys(("seed", "seeds"), "generator"),
    **{"policy": "order", "prompts": "prompt"},
}
"""What other programs, and earlier versions, call an argument."""


@dataclass(frozen=True)
class ImageRequest:
    """What to generate and how: the arguments of `Pipeline.__call__`, in this sequence."""

    class_labels: int | str | Sequence[int | str] | None = None
    """One label or one per image, by index or name; None generates without a class."""
    num_images: int | None = None
    """How many; by default the number of labels, prompts, values of an attribute, or given images. Fewer of
    these are taken in turn: ["cat", "dog"] and 4 images are cat, dog, cat, dog."""
    order: str | Sequence[int] | Tensor | PolicyConfig | OrderPolicy | None = None
    """"random", a static order ("raster", "hilbert", ...), a score ("entropy", "max_prob", "margin",
    "token_likelihood", "information"), "location" (a location head), "class_mean" (the order of each image's
    class, see `Pipeline`), an order (N,) or (B, N), or a `PolicyConfig`; by default the pipeline's policy."""
    guidance_scale: float | GuidanceConfig | None = None
    """1 is none; more pulls images towards the class, prompt and attributes. Or a `GuidanceConfig`. By
    default the pipeline's where there is a condition; likelihoods are those of the unguided model."""
    generator: int | Sequence[int] | torch.Generator = 0
    """A seed (image i uses seed + i), one seed per image, or a `torch.Generator` that the seeds are taken
    from. An image depends on its seed alone, up to rounding, which may differ with the batch size."""
    guidance_schedule: Schedule | None = None
    """How the scale grows while the image is generated: "constant" (default), "linear" or "power-cosine"."""
    sampling: Sampling | Mapping[str, Any] | None = None
    """Temperature, top-k, top-p, min-p; a `Sampling` or its fields. By default the pipeline's."""
    grid: Grid | tuple[int, int] | None = None
    """Rows and columns of patches, where they are not those of training."""
    prompt: str | Sequence[str] | None = None
    """A text, or one per image, for a model that was trained with captions; "" is none."""
    attributes: Mapping[str, str | Sequence[str | None] | None] | None = None
    """Values by name, {"baseColour": "Red"}, one or one per image (None: none), for a model that was trained
    with attributes."""
    condition: Tensor | None = None
    """Instead of labels, prompt and attributes: (B,) or (B, 1 + A + L) int64, see `contracts`."""

    @classmethod
    def of(cls, *request: Any, **settings: Any) -> "ImageRequest":
        """The request of these arguments; a TypeError says what an unknown one is called here."""
        for name in settings.keys() - cls.__dataclass_fields__.keys():
            hint = f": it is called {_NAMES[name]}" if name in _NAMES else ""
            known = hint or did_you_mean(name, cls.__dataclass_fields__)
            raise TypeError(f"no argument '{name}'{known}")
        return cls(*request, **settings)

    # The members below raise a ValueError where the fields make no sense.

    def guidance(self, own: GuidanceConfig) -> GuidanceConfig:
        """The guidance, whichever way it is given; a scale alone keeps the schedule of `own`."""
        scale = 1 if self.guidance_scale is None else self.guidance_scale
        schedule = self.guidance_schedule
        if isinstance(scale, GuidanceConfig):
            require(schedule is None, "a GuidanceConfig says the schedule: leave out guidance_schedule")
            return scale
        finite = isinstance(scale, int | float | np.number) and math.isfinite(scale)
        require(finite, f"guidance_scale must be a finite number or a GuidanceConfig, got {scale!r}")
        text = "guidance_schedule has no effect at guidance_scale=1: give a scale, say 2"
        require(schedule is None or scale != 1, text)
        if schedule or scale == 1:
            return GuidanceConfig(float(scale), schedule or "constant")
        return replace(own, scale=float(scale), locations=None)

    @property
    def tokens(self) -> Sampling | None:
        """How tokens are sampled, if it is given."""
        given = self.sampling
        if given is None or isinstance(given, Sampling):
            return given
        try:
            return Sampling(**given)
        except TypeError as e:
            fields = ", ".join(Sampling.__dataclass_fields__)
            raise ValueError(f"sampling must be a Sampling or a mapping of {fields}, got {given!r}") from e

    @property
    def shape(self) -> Grid | None:
        """The grid, if one is given."""
        if self.grid is None or isinstance(self.grid, Grid):
            return self.grid
        try:
            return Grid(*map(operator.index, self.grid))
        except TypeError as e:
            raise ValueError(f"grid must be (rows, columns) in patches, got {self.grid!r}") from e

    def seeds(self, n: int) -> list[int]:
        """One seed for each of n images."""
        given: Any = self.generator
        if isinstance(given, torch.Generator):
            return torch.randint(2**31, (n,), generator=given, device=given.device).tolist()
        try:
            if np.ndim(given) == 0:
                return [operator.index(given) + i for i in range(n)]
            seeds = [operator.index(seed) for seed in given]
        except TypeError as e:
            kinds = "a seed, one seed per image or a torch.Generator"
            raise ValueError(f"generator must be {kinds}, got {given!r}") from e
        require(len(seeds) == n, f"got {len(seeds)} seeds for {n} images: give one seed, or one per image")
        return seeds

    def columns(self, n: int | None) -> tuple[int, dict[str, list[Any]]]:
        """The number of images (`n`, if given); n "labels", "prompts", "values of NAME" or "conditions"."""
        given: dict[str, Any] = {"labels": self.class_labels, "prompts": self.prompt}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {VALUES + name: value for name, value in (self.attributes or {}).items()}
        if self.condition is not None:
            require(not given, f"give either condition=..., or {' and '.join(given)}")
            given = {"conditions": self.condition}
        lists = {name: _listed(value) for name, value in given.items()}
        n = max(map(len, lists.values()), default=1) if n is None else n
        whole = isinstance(n, int | np.integer) and n >= 1
        require(whole, f"num_images must be a whole number >= 1, got {n!r}")
        for name, values in lists.items():
            text = f"got {len(values)} {name} for num_images={n}: give one, or one per image"
            fits = 0 < len(values) <= n if self.num_images is not None else len(values) in (1, n)
            require(fits, text)
        return int(n), {name: [values[i % len(values)] for i in range(n)] for name, values in lists.items()}


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) or np.ndim(value) == 0 else list(value)


Method = TypeVar("Method", bound=Callable[..., Any])


def takes_request(method: Method) -> Method:
    """Show the fields of `ImageRequest` in the signature of a method that takes (*request, **settings)."""
    fields = list(inspect.signature(ImageRequest).parameters.values())
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in fields[5:]]  # the first five are given by position
    own = list(inspect.signature(method).parameters.values())
    positional, keywords = ([p for p in own if p.kind is kind] for kind in (own[0].kind, named[0].kind))
    signature = inspect.Signature([*positional, *fields[:5], *keywords, *named])
    method.__signature__ = signature  # type: ignore[attr-defined]
    return method
